"""Workers, schedulers and drivers that die in the middle of a build: what they lose is time."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from dask_processes import running
from distributed import Client
from faulty_teachers import Deadly, Noted, Together, calls_in, end_victims, resources_and_pid
from tiny_caches import TinyTeacher, build_tiny, files_of, tiny_inputs

from kdcache import TransferSet, open_cache, verify_cache
from kdcache.build.executors import dask_cluster, flight
from kdcache.build.teachers import ModuleTeacher
from kdcache.build.work import StoredTeacher, Work
from kdcache.documents import DaskCluster, DaskLocal
from kdcache.errors import ExecutorError
from kdcache.store import CacheStore

OPTIONS = {"num_classes": 5, "num_pilot_rows": 1, "batch_size": 4, "shard_rows": 8, "chunk_rows": 8}
BAD_EXAMPLE = 30
BAD_SHARD = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running(tmp_path_factory.mktemp("cluster")) as started:
        yield DaskCluster.make(address=started.address)


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The data digest of the same rows, built in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return build(folder / "cache", TinyTeacher(0)).complete.data_digest


def build(folder, teacher, **options):
    return build_tiny(folder, TransferSet.from_arrays(tiny_inputs()), {"a": teacher}, **{**OPTIONS, **options})


def deadly(notes, how):
    (notes / "deadly").touch()
    return Deadly(notes, float(tiny_inputs()[BAD_EXAMPLE, 0]), how)


def published(folder):
    return {int(path.stem) for path in (folder / "commits/a").iterdir()}


@pytest.fixture
def reaper(notes):
    """Plays the kernel that is out of memory."""
    stop = threading.Event()
    ended = []

    def reap():
        while not stop.wait(0.01):
            ended.extend(end_victims(notes))

    thread = threading.Thread(target=reap)
    thread.start()
    yield ended
    stop.set()
    thread.join()


# Workers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"),
    [
        pytest.param("exit", r"exited with status 1", marks=pytest.mark.slow),
        pytest.param("segfault", r"was killed by signal 11 \(SIGSEGV", marks=pytest.mark.slow),
        pytest.param("killed", r"was killed by signal 9 \(SIGKILL"),
    ],
)
def test_a_shard_that_kills_its_workers_is_put_into_quarantine_and_the_rest_is_built(
    folder, notes, cluster, reaper, how, told
):
    with pytest.raises(ExecutorError) as caught:
        build(folder, deadly(notes, how), executor=cluster)
    assert caught.match(r"1 of 5 shard\(s\) are in quarantine")
    assert caught.match(r"teacher 'a', shard 3: rows 24 to 31 of view 0, examples 24 to 31; 2 worker\(s\) died of it")
    assert caught.match(told)
    assert published(folder) == set(range(5)) - {BAD_SHARD}
    assert (len(reaper) > 0) == (how == "killed")


@pytest.mark.slow
def test_a_shard_in_quarantine_is_built_once_its_fault_is_mended(folder, notes, cluster, undisturbed):
    teacher = deadly(notes, "exit")
    with pytest.raises(ExecutorError, match="run the same command again"):
        build(folder, teacher, executor=cluster)
    (notes / "deadly").unlink()
    assert build(folder, teacher, executor=cluster).complete.data_digest == undisturbed
    assert verify_cache(folder).is_sound


@pytest.mark.slow
def test_shards_side_by_side_that_kill_every_worker_keep_no_other_from_being_built(folder, notes):
    (notes / "deadly").touch()
    inputs = tiny_inputs()
    inputs[4:16, 0] = 7.0
    with pytest.raises(ExecutorError, match=r"3 of 10 shard\(s\) are in quarantine"):
        build_tiny(
            folder, TransferSet.from_arrays(inputs), {"a": Deadly(notes, 7.0, "exit")},
            **{**OPTIONS, "shard_rows": 4, "chunk_rows": 4}, executor=DaskLocal(num_workers=2),
        )  # fmt: skip
    assert published(folder) == {0, *range(4, 10)}


# Twice ----------------------------------------------------------------------------------------------------------------


def test_a_task_that_runs_on_two_workers_at_once_leaves_one_shard_and_one_record(folder, notes, cluster):
    teacher = Together(notes)
    work = begun(folder, teacher)
    with Client(cluster.address, set_as_default=False) as client:
        client.wait_for_workers(2)
        parcel = dask_cluster._Parcel.of(work)
        futures = [
            client.submit(dask_cluster._run_span, parcel, "a", [1], pure=False, workers=[worker])
            for worker in client.ncores()
        ]
        records = client.gather(futures)
    assert {call.first_input for call in calls_in(notes)} == {f"{float(tiny_inputs()[row, 0]):.6f}" for row in (8, 12)}
    assert len(calls_in(notes)) == 4
    assert len({call.pid for call in calls_in(notes)}) == 2
    assert records[0] == records[1]
    assert published(folder) == {1}
    assert [path.name for path in (folder / "teachers/a/codes/c/1").iterdir()] == ["0"]


def begun(folder, teacher):
    """A build that was stopped before its first task."""
    build(folder, TinyTeacher(0))
    for path in [folder / "complete.json", *folder.glob("commits/a/*"), *folder.glob("teachers/a/codes/c/*/0")]:
        path.unlink()
    plan = CacheStore.at(folder).plans()[0]
    transfer_set = TransferSet.from_arrays(tiny_inputs())
    return Work(str(folder), plan, transfer_set, (StoredTeacher("a", ModuleTeacher("a", teacher), ()),))


@pytest.mark.slow
def test_two_builds_at_once_on_one_cluster_leave_one_sound_cache(folder, notes, cluster, undisturbed):
    teacher = Noted(notes, seconds=0.05)
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build, folder, teacher, executor=cluster) for _ in range(2)]
        digests = {future.result().complete.data_digest for future in builds}
    assert digests == {undisturbed}
    assert len([name for name in files_of(folder) if name.startswith("commits/")]) == 5
    assert verify_cache(folder).is_sound


# Resources ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_run_one_task_at_a_time_on_their_accelerator_and_others_none(tmp_path, folder, notes, undisturbed):
    gpu = ("--resources", "GPU=1")
    with running(tmp_path / "gpus", [gpu, gpu, ()], nthreads=2) as cluster:
        executor = DaskCluster.make(address=cluster.address, resources={"GPU": 1.0})
        with Client(cluster.address, set_as_default=False) as client:
            client.wait_for_workers(3)
            offered = client.run(resources_and_pid)
        build(folder, Noted(notes, seconds=0.05), executor=executor)
    with_gpu = {pid for resources, pid in offered.values() if resources}
    calls = sorted((call for call in calls_in(notes)), key=lambda call: call.start)
    assert {call.pid for call in calls} == with_gpu
    assert overlaps(calls) == []
    assert len(calls) == 11  # ten batches, and one of the pilot
    assert open_cache(folder).complete.data_digest == undisturbed


def overlaps(calls):
    """Pairs of batches that one process ran at the same time."""
    return [
        (one, other)
        for number, one in enumerate(calls)
        for other in calls[number + 1 :]
        if one.pid == other.pid and other.start < one.end
    ]


# Schedulers -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="silent")],
)
def test_a_lost_scheduler_is_an_error_after_a_while_and_costs_nothing_that_was_published(
    tmp_path, folder, notes, undisturbed, monkeypatch, how
):
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 8.0)
    monkeypatch.setattr(flight, "CHECK_SECONDS", 0.5)
    teacher = Noted(notes, seconds=0.1)
    with running(tmp_path / "cluster", [()]) as cluster:

        def lose_scheduler(step):
            if step.stage == "tasks" and step.done_rows >= 8:
                cluster.scheduler.send_signal(how)

        with pytest.raises(ExecutorError, match=r"the Dask scheduler at tcp://127\.0\.0\.1:\d+ was lost: .* is kept"):
            build(folder, teacher, executor=DaskCluster.make(address=cluster.address), on_progress=lose_scheduler)
    kept = published(folder)
    assert len(kept) > 0
    num_calls = len(calls_in(notes))
    assert build(folder, teacher).complete.data_digest == undisturbed
    assert len(calls_in(notes)) - num_calls == 2 * (5 - len(kept))
