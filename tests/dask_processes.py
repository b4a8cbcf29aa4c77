"""A Dask cluster as a user starts it: `dask scheduler` and `dask worker`, each a process of its own, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",  # each death more takes seconds
    "CUDA_VISIBLE_DEVICES": "",
}


class Cluster:
    """A scheduler and workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._file = folder / "scheduler.json"
        self.scheduler = self._start(
            "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self._file)
        )
        deadline = time.monotonic() + 60
        while not self._file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.address: str = json.loads(self._file.read_text())["address"]

    def add_worker(self, *options: str, nthreads: int = 1) -> None:
        self._start(
            "distributed.cli.dask_worker", self.address, "--nthreads", str(nthreads), "--host", "127.0.0.1",
            "--local-directory", str(self._folder), "--death-timeout", "30", "--memory-limit", "0", *options,
        )  # fmt: skip

    def stop(self) -> None:
        """End every process, and those that watch over others by asking them to."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
            process.kill()
            process.wait()

    def _start(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--no-dashboard", *options], env=ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._folder,
        )  # fmt: skip
        self._processes.append(process)
        return process


@contextlib.contextmanager
def running(folder: Path, workers: Sequence[Sequence[str]] = ((), ()), *, nthreads: int = 1) -> Iterator[Cluster]:
    """Run a cluster of workers with these options."""
    folder.mkdir(exist_ok=True)
    cluster = Cluster(folder)
    try:
        for options in workers:
            cluster.add_worker(*options, nthreads=nthreads)
        yield cluster
    finally:
        cluster.stop()
