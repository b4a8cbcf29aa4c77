from __future__ import annotations

import gc
import importlib
import signal
import sys
import time
from pathlib import Path

import distributed
import pytest
import torch
from tiny_caches import TinyTeacher, build_tiny, files_of, tiny_inputs, tiny_transfer_set
from torch import nn

from kdcache import Codes, TransferSet, open_cache
from kdcache.build import ModuleTeacher
from kdcache.build.executors import InProcessExecutor, dask_cluster, open_executor
from kdcache.build.executors.dask_cluster import DaskExecutor, open_cluster
from kdcache.build.executors.rounds import spans_of
from kdcache.build.plan import make_plan
from kdcache.build.work import Work
from kdcache.documents import DaskCluster, DaskJobqueue, DaskLocal, InProcess, PlanDocument
from kdcache.errors import ExecutorError, MissingExtraError, NonFiniteLogitsError, TeacherError, WrongClassCountError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def running_cluster():
    """A scheduler and two workers of two threads each, as a user might have started them; in this process."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0", protocol="tcp"
    ) as cluster:
        yield DaskCluster.make(address=cluster.scheduler_address)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    build_tiny(folder)
    return files_of(folder)


# Choosing -------------------------------------------------------------------------------------------------------------


def test_this_process_is_an_executor():
    assert isinstance(open_executor(InProcess()), InProcessExecutor)


@pytest.mark.parametrize(
    "spec", [DaskLocal(), DaskCluster.make(address="tcp://h:1"), DaskJobqueue()], ids=lambda spec: spec.kind
)
def test_clusters_are_executors(spec):
    assert isinstance(open_executor(spec), DaskExecutor)


def test_an_executor_of_ones_own_is_taken_as_it_is():
    own = InProcessExecutor()
    assert open_executor(own) is own


def test_without_dask_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "kdcache.build.executors.dask_cluster")
    with pytest.raises(MissingExtraError, match=r"needs Dask, which is not installed.*pip install 'kdcache\[dask\]'"):
        open_executor(DaskLocal())


# In this process ------------------------------------------------------------------------------------------------------


def test_a_build_in_this_process_runs_one_teacher_after_the_other(folder):
    steps = []
    build_tiny(folder, executor=InProcess(), on_progress=steps.append)
    assert [step.teacher for step in steps if step.stage == "tasks"][1:] == ["a"] * 3 + ["b"] * 3


# A running cluster ----------------------------------------------------------------------------------------------------


def test_a_cluster_writes_the_files_of_an_undisturbed_build(folder, running_cluster, undisturbed):
    build_tiny(folder, executor=running_cluster)
    assert files_of(folder) == undisturbed


def test_a_cluster_goes_on_with_what_another_executor_began(folder, running_cluster, undisturbed):
    build_tiny(folder)
    (folder / "complete.json").unlink()
    (folder / "commits/b/1.json").unlink()
    build_tiny(folder, executor=running_cluster)
    assert files_of(folder) == undisturbed


def test_a_finished_cache_needs_no_cluster(folder):
    build_tiny(folder)
    assert build_tiny(folder, executor=DaskCluster.make(address="tcp://127.0.0.1:1")).complete is not None


def test_progress_of_a_cluster_counts_every_row(folder, running_cluster):
    steps = []
    build_tiny(folder, executor=running_cluster, on_progress=steps.append)
    assert (steps[-1].done_rows, steps[-1].total_rows) == (80, 80)


def test_a_cluster_is_left_running(folder, running_cluster):
    build_tiny(folder, executor=running_cluster)
    with distributed.Client(running_cluster.address, set_as_default=False) as client:
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2


class Noisy(nn.Module):
    """A teacher whose training mode shows in its logits, and that takes longer for later examples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = TinyTeacher(0)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005 * float(inputs[0, 0]))
        return self.dropout(self.linear(inputs))


def test_threads_of_one_worker_do_not_disturb_each_others_teacher(folder, running_cluster):
    inputs = torch.cat([torch.linspace(0, 1, 40)[:, None], tiny_inputs()[:, 1:]], dim=1)
    cache = build_tiny(
        folder, TransferSet.from_arrays(inputs), {"a": Noisy().train()},
        executor=running_cluster, batch_size=1, shard_rows=10, chunk_rows=10, num_pilot_rows=1,
    )  # fmt: skip
    expected = TinyTeacher(0)(inputs).detach()
    assert torch.allclose(cache.read(range(40)).logits()[:, 0], expected, atol=1e-5)


class Spoiled(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear = TinyTeacher(0)
        self.marker = float(tiny_inputs()[30, 0])
        self.value = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = self.linear(inputs)
        logits[inputs[:, 0] == self.marker] = self.value
        return logits


def test_a_typed_error_on_a_worker_is_raised_here(folder, running_cluster):
    with pytest.raises(NonFiniteLogitsError, match=r"teacher 'a' gave nan among the logits of example 30"):
        build_tiny(folder, teachers={"a": Spoiled(torch.nan)}, executor=running_cluster, num_pilot_rows=12)


def test_shards_that_were_published_before_an_error_are_kept(folder, running_cluster):
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(
            folder, teachers={"a": Spoiled(torch.nan)}, executor=running_cluster, num_pilot_rows=12, batch_size=4
        )
    assert open_cache(folder, allow_incomplete=True).complete is None
    assert {name for name in files_of(folder) if name.startswith("commits")} == {"commits/a/0.json", "commits/a/2.json"}


def test_an_error_that_cannot_travel_is_put_into_words(folder, running_cluster):
    class StubbornError(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    class Failing:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 13:
                raise StubbornError("left", "right")
            return torch.zeros(4)

    transfer_set = TransferSet(Failing(), digest_inputs=False, labels=[0] * 20)
    with pytest.raises(TeacherError, match="StubbornError: left and right"):
        build_tiny(folder, transfer_set, executor=running_cluster, num_pilot_rows=1)


def test_a_typed_error_in_a_pilot_on_a_worker_is_raised_here_and_writes_nothing(folder, running_cluster):
    with pytest.raises(WrongClassCountError, match="teacher 'b' gives 7 classes, the cache has 5"):
        build_tiny(folder, teachers={"a": TinyTeacher(), "b": TinyTeacher(num_classes=7)}, executor=running_cluster)
    assert not folder.exists()


def test_an_error_of_the_datasets_own_on_a_worker_is_raised_here(folder, running_cluster):
    class Failing:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 13:
                raise OSError("disc gone")
            return torch.zeros(4)

    with pytest.raises(OSError, match="disc gone"):
        build_tiny(folder, TransferSet(Failing(), digest_inputs=False, labels=[0] * 20), executor=running_cluster)


def test_where_no_scheduler_answers_the_address_is_named(folder, monkeypatch):
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ExecutorError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1: .*dask scheduler"):
        build_tiny(folder, executor=DaskCluster.make(address="tcp://127.0.0.1:1"))


def test_where_no_scheduler_answers_nothing_is_written(folder, monkeypatch):
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ExecutorError):
        build_tiny(folder, executor=DaskCluster.make(address="tcp://127.0.0.1:1"))
    assert not folder.exists()


def test_a_scheduler_without_workers_is_given_up_after_a_while(folder, monkeypatch):
    monkeypatch.setattr(dask_cluster, "WORKER_SECONDS", 0.2)
    with (
        distributed.LocalCluster(
            n_workers=0, processes=False, dashboard_address="127.0.0.1:0", protocol="tcp"
        ) as cluster,
        pytest.raises(ExecutorError, match="the Dask scheduler has no workers, and none came"),
    ):
        build_tiny(folder, executor=DaskCluster.make(address=cluster.scheduler_address))
    assert not folder.exists()


def test_a_cluster_whose_workers_lack_the_resources_is_given_up_after_a_while(folder, running_cluster, monkeypatch):
    monkeypatch.setattr(dask_cluster, "WORKER_SECONDS", 0.2)
    with pytest.raises(ExecutorError, match=r"has no workers that offer .'GPU': 1.0.*--resources GPU=1"):
        build_tiny(folder, executor=DaskCluster.make(address=running_cluster.address, resources={"GPU": 1.0}))
    assert not folder.exists()


def test_an_address_that_is_none_is_an_executor_error(folder):
    with pytest.raises(ExecutorError, match="no Dask scheduler answers at nonsense://here"):
        build_tiny(folder, executor=DaskCluster.make(address="nonsense://here"))


# Clusters of our own --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_cluster_of_processes_runs_a_live_module(folder, undisturbed):
    build_tiny(folder, executor=DaskLocal.make(num_workers=1))
    assert files_of(folder) == undisturbed


SLURM = DaskJobqueue.make(
    cluster="SLURMCluster",
    num_jobs=3,
    options={
        "queue": "gpu", "cores": 4, "memory": "16GB", "walltime": "02:00:00", "job_extra_directives": ["--gres=gpu:1"],
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"}, "worker_extra_args": ["--resources", "GPU=1"],
    },
    resources={"GPU": 1.0},
)  # fmt: skip


@pytest.fixture
def slurm_script(monkeypatch):
    dask_jobqueue = dask_cluster._import_jobqueue()
    scaled = []
    monkeypatch.setattr(dask_jobqueue.SLURMCluster, "scale", lambda _, jobs: scaled.append(jobs))
    with open_cluster(SLURM) as cluster:
        yield cluster.job_script(), scaled


@pytest.mark.parametrize(
    "line", ["#SBATCH -p gpu", "#SBATCH -t 02:00:00", "#SBATCH --gres=gpu:1", "--cpus-per-task=4", "--resources GPU=1"]
)
def test_a_batch_system_is_asked_with_the_options_of_the_job(slurm_script, line):
    assert line in slurm_script[0]


def test_a_batch_system_is_asked_for_the_number_of_jobs(slurm_script):
    assert slurm_script[1] == [3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_jobs_of_a_batch_system_run_the_tasks(folder, undisturbed, monkeypatch):
    """dask-jobqueue's own stand-in for a batch system starts the job script's worker on this machine."""
    dask_jobqueue = dask_cluster._import_jobqueue()
    local = importlib.import_module("dask_jobqueue.local")
    monkeypatch.setattr(dask_jobqueue, "LocalCluster", local.LocalCluster, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    options = {
        "cores": 1, "memory": "2GB", "scheduler_options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"},
        "local_directory": str(folder.parent), "nanny": False, "death_timeout": 60,
    }  # fmt: skip
    build_tiny(folder, executor=DaskJobqueue.make(cluster="LocalCluster", options=options))
    gc.collect()  # its pipes complain when they are collected; here, not in another test
    assert files_of(folder) == undisturbed


def test_tasks_take_the_resources_of_the_job():
    assert DaskExecutor(SLURM)._resources == {"GPU": 1.0}


def test_a_batch_system_that_dask_jobqueue_does_not_know_is_named():
    with pytest.raises(ExecutorError, match="dask_jobqueue has no FoggyCluster; nothing was written by this run"):
        open_cluster(DaskJobqueue.make(cluster="FoggyCluster"))


@pytest.mark.filterwarnings(
    "ignore:unclosed cluster:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_options_that_a_batch_system_does_not_take_are_named():
    with pytest.raises(
        ExecutorError, match=r"SLURMCluster\(queue\) cannot be started: You must specify how much cores"
    ):
        open_cluster(DaskJobqueue.make(options={"queue": "gpu"}))
    gc.collect()  # dask-jobqueue's half-made cluster complains when it is collected; here, not in another test


def test_a_batch_system_leaves_the_interrupt_key_as_it_is(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dask_jobqueue")]:
        monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGINT)
    dask_cluster._import_jobqueue()
    assert signal.getsignal(signal.SIGINT) is before


def test_without_dask_jobqueue_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kdcache\[jobqueue\]'"):
        open_cluster(SLURM)


# Spans ----------------------------------------------------------------------------------------------------------------


def work_with(batch_size, shard_rows) -> Work:
    teacher = ModuleTeacher("a", TinyTeacher())
    plan: PlanDocument = make_plan(
        tiny_transfer_set(),
        [teacher.fingerprint],
        codec=Codes(),
        num_classes=5,
        batch_size=batch_size,
        shard_rows=shard_rows,
    )
    return Work("nowhere", plan, tiny_transfer_set(), ())


def test_small_shards_are_sent_together_so_that_batches_are_not_run_for_each():
    tasks = {("a", shard) for shard in range(10)}
    assert list(spans_of(work_with(8, 4), tasks)) == [("a", [0, 1, 2, 3]), ("a", [4, 5, 6, 7]), ("a", [8, 9])]


def test_large_shards_are_sent_one_by_one():
    assert list(spans_of(work_with(4, 8), {("a", 1), ("a", 0), ("b", 2)})) == [("a", [0]), ("a", [1]), ("b", [2])]


def test_every_task_is_sent_once():
    tasks = {(name, shard) for name in "ab" for shard in (0, 2, 3, 7, 9)}
    sent = [(name, shard) for name, shards in spans_of(work_with(8, 4), tasks) for shard in shards]
    assert (len(sent), set(sent)) == (len(tasks), tasks)
