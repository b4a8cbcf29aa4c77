"""A build that is killed at any moment is finished by the same command, with the data of an undisturbed build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dask_processes import running

from kdcache import open_cache, verify_cache
from kdcache.errors import IncompleteCacheError

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_job(folder: Path, cache: str, *, flag: Path | None = None, at: int = 0, seconds: float = 0.02) -> Path:
    killer = f'factory = "slow_job:killer"\narguments = {{ seed = 1, flag = "{flag}", at = {at}, seconds = {seconds} }}'
    plain = f'factory = "slow_job:teacher"\narguments = {{ seed = 1, seconds = {seconds} }}'
    job = folder / f"{cache}.toml"
    (folder / "slow_job.py").write_text((FIXTURES / "slow_job.py").read_text())
    job.write_text(
        f'name = "kill"\n[cache]\naddress = "{cache}"\nshard_rows = 128\n'
        '[transfer_set]\nfactory = "slow_job:transfer_set"\n[build]\nbatch_size = 96\n'
        f'[[teachers]]\nname = "a"\nfactory = "slow_job:teacher"\narguments = {{ seed = 0, seconds = {seconds} }}\n'
        f'[[teachers]]\nname = "b"\n{killer if flag else plain}\n'
    )
    return job


def build(job: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kdcache", "build", str(job), "--json", *options],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(build(write_job(folder, "cache", seconds=0.0)))["data_digest"]


def wait_for_records(cache: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(cache.glob("commits/*/*.json"))) < count:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline, "no shard was published"
        time.sleep(0.005)


@pytest.mark.parametrize("num_records", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (20, 45))])
def test_a_killed_build_is_finished_by_the_same_command_with_equal_data(tmp_path, undisturbed, num_records):
    job = write_job(tmp_path, "cache")
    process = build(job)
    wait_for_records(tmp_path / "cache", num_records, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(IncompleteCacheError):
        open_cache(tmp_path / "cache")
    assert finish(build(job))["data_digest"] == undisturbed
    assert verify_cache(tmp_path / "cache").is_sound


@pytest.mark.slow
@pytest.mark.parametrize("at", [pytest.param(5, id="in the pilot"), pytest.param(24, id="in the tasks")])
def test_a_local_cluster_outlives_a_killed_worker_with_equal_data(tmp_path, undisturbed, at):
    flag = tmp_path / "killed"
    result = finish(build(write_job(tmp_path, "cache", flag=flag, at=at), "--workers", "2"))
    assert flag.exists()
    assert result["data_digest"] == undisturbed
    assert verify_cache(tmp_path / "cache").is_sound


@pytest.mark.slow
def test_a_killed_driver_of_a_local_cluster_loses_nothing_and_leaves_no_worker(tmp_path, undisturbed):
    job = write_job(tmp_path, "cache")
    process = build(job, "--workers", "2")
    wait_for_records(tmp_path / "cache", 5, process)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert workers
    assert wait_until_gone(workers, seconds=60) == set()
    assert finish(build(job, "--workers", "2"))["data_digest"] == undisturbed
    assert verify_cache(tmp_path / "cache").is_sound


@pytest.mark.slow
def test_a_killed_driver_of_a_running_cluster_loses_nothing(tmp_path, undisturbed):
    job = write_job(tmp_path, "cache")
    with running(tmp_path / "cluster") as cluster:
        process = build(job, "--dask", cluster.address)
        wait_for_records(tmp_path / "cache", 5, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert finish(build(job, "--dask", cluster.address))["data_digest"] == undisturbed
    assert verify_cache(tmp_path / "cache").is_sound


@pytest.mark.slow
def test_a_killed_scheduler_ends_the_command_as_incomplete_and_another_cluster_finishes(tmp_path, undisturbed):
    job = write_job(tmp_path, "cache")
    with running(tmp_path / "cluster") as cluster:
        process = build(job, "--dask", cluster.address)
        wait_for_records(tmp_path / "cache", 5, process)
        cluster.scheduler.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "was lost" in json.loads(errors.splitlines()[-1])["message"]
    with running(tmp_path / "another") as cluster:
        assert finish(build(job, "--dask", cluster.address))["data_digest"] == undisturbed
    assert verify_cache(tmp_path / "cache").is_sound


def children_of(pid: int) -> set[int]:
    """The processes below one, at any depth."""
    found, seen = {pid}, set()
    while found:
        seen |= found
        lists = (path.read_text() for one in found for path in Path(f"/proc/{one}/task").glob("*/children"))
        found = {int(text) for line in lists for text in line.split()} - seen
    return seen - {pid}


def wait_until_gone(pids: set[int], *, seconds: float) -> set[int]:
    """Wait for processes to end; gives those that did not."""
    deadline = time.monotonic() + seconds
    left = pids
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = {pid for pid in left if is_running(pid)}
    return left


def is_running(pid: int) -> bool:
    """Tell whether a process lives; one that has ended and is not yet fetched does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
