"""Building what a job file says."""

from __future__ import annotations

__all__ = ["build_job", "job_options", "plan_job"]

from collections.abc import Callable
from typing import Any

from kdcache.build.builder import BuildProgress, build_cache, plan_cache
from kdcache.build.executors import Executor
from kdcache.build.pilot import Forecast
from kdcache.build.teachers import SourcedTeacher
from kdcache.cache import SoftTargetCache
from kdcache.documents import ExecutorSpec
from kdcache.errors import JobError
from kdcache.jobs import LoadedJob
from kdcache.transfer_set import TransferSet


def build_job(
    loaded: LoadedJob,
    *,
    executor: ExecutorSpec | Executor | None = None,
    add_teachers: bool = False,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> SoftTargetCache:
    """Build a job's cache, or go on with it after a stop: `build_cache` with all that the job file says.

    Parameters
    ----------
    loaded : LoadedJob
        As `kdcache.jobs.read_job` gives it.
    executor : executor spec, optional
        In place of the job's.
    add_teachers : bool
        Allow teachers that the standing cache does not have yet.
    on_progress : callable (BuildProgress), optional

    Returns
    -------
    SoftTargetCache
        The finished cache, open.

    Raises
    ------
    JobError
        The job names no teachers, or its transfer set's factory gives something else.
    KdcacheError
        As `build_cache`.
    """
    options = job_options(loaded, executor)
    return build_cache(**options, add_teachers=add_teachers, on_progress=on_progress)


def plan_job(
    loaded: LoadedJob,
    *,
    executor: ExecutorSpec | Executor | None = None,
    add_teachers: bool = False,
    max_kl: float | None = None,
    bytes_per_row: float | None = None,
) -> Forecast:
    """Plan a job's build and run its pilots, without writing anything; see `plan_cache`.

    Parameters
    ----------
    loaded, executor, add_teachers
        As of `build_job`.
    max_kl, bytes_per_row : float, optional
        In place of what the job says of the codec; see `build_cache`.

    Raises
    ------
    KdcacheError
        Whatever would stop the build at its start.
    """
    options = job_options(loaded, executor)
    if max_kl is not None or bytes_per_row is not None:
        options |= {"codec": None, "max_kl": max_kl, "bytes_per_row": bytes_per_row}
    return plan_cache(**options, add_teachers=add_teachers)


def job_options(loaded: LoadedJob, executor: ExecutorSpec | Executor | None = None) -> dict[str, Any]:
    """Give the arguments of `build_cache` that a job file says.

    Raises
    ------
    JobError
        The job names no teachers, or its transfer set's factory gives something else.
    """
    job = loaded.job
    if not job.teachers:
        raise JobError(f"job {job.name!r} names no teachers, so there is nothing to build; add [[teachers]] to it")
    transfer_set = loaded.make(job.transfer_set)
    if not isinstance(transfer_set, TransferSet):
        raise JobError(
            f"{job.transfer_set.factory!r} gave a {type(transfer_set).__qualname__}; a transfer set's factory returns "
            "a kdcache.TransferSet. Nothing was written"
        )
    teachers = [SourcedTeacher(source, loaded.folder, job.build.device, job.build.autocast) for source in job.teachers]
    return {
        "address": loaded.cache_address,
        "transfer_set": transfer_set,
        "teachers": teachers,
        "codec": job.cache.codec,
        "max_kl": job.cache.max_kl,
        "bytes_per_row": job.cache.bytes_per_row,
        "num_classes": job.cache.num_classes,
        "merge": job.cache.merge,
        "shard_rows": job.cache.shard_rows,
        "chunk_rows": job.cache.chunk_rows,
        "num_pilot_rows": job.cache.num_pilot_rows,
        "batch_size": job.build.batch_size,
        "num_workers": job.build.num_workers,
        "executor": executor or job.build.executor,
    }
