"""The steps around the cache: data and teacher before it, students after it. Each is skipped where its work is done."""

from __future__ import annotations

__all__ = ["JOB_FILE", "OUT", "prepare_teacher", "train_students"]

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from jobs.mnist.data import fetch
from jobs.mnist.train_teacher import Settings, train
from kdcache.jobs import LoadedJob, read_job, resolve_path
from kdcache.students import train_job

JOB_FILE = Path(__file__).with_name("job.toml")
OUT = Path(__file__).with_name("out")
_CHECKPOINT_EPOCHS = 5


def prepare_teacher(loaded: LoadedJob) -> Path:
    """Fetch the data and train the teacher, where either is missing; give the teacher's checkpoint."""
    fetch()
    (source,) = loaded.job.teachers
    checkpoint = Path(resolve_path(str(source.checkpoint), loaded.folder))
    return checkpoint if checkpoint.is_file() else train(Settings(seed=0))


def train_students(
    job_file: Path, sweeps: Sequence[str], *, out: Path, num_processes: int, report: Callable[[str], None]
) -> None:
    """Train sweeps, each in a process with one torch thread; stopped ones go on, finished ones are kept.

    Parameters
    ----------
    job_file : Path
        Whose cache is finished.
    sweeps : sequence of str
        Names, in the order in which they are begun.
    out : Path
        Takes ``students/SWEEP/``.
    num_processes : int
        Sweeps that are trained at the same time.
    report : callable (line)
        Told when a sweep is done.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(_train_sweep, job_file, name, out) for name in sweeps]
        for done in as_completed(waiting):
            report(done.result())


def _train_sweep(job_file: Path, name: str, out: Path) -> str:
    torch.set_num_threads(1)
    started = time.process_time()
    results = train_job(read_job(job_file), out=out, only=[name], checkpoint_epochs=_CHECKPOINT_EPOCHS)
    return f"{name}: {len(results)} students, {(time.process_time() - started) / 60:.1f} CPU-minutes in this run"
