"""Executors: where tasks run. Only modules of this package import Dask, and only when asked for."""

from __future__ import annotations

__all__ = ["Executor", "InProcessExecutor", "open_executor"]

from kdcache.build.executors.base import Executor
from kdcache.build.executors.in_process import InProcessExecutor
from kdcache.documents import DaskCluster, DaskJobqueue, DaskLocal, ExecutorSpec, InProcess
from kdcache.errors import MissingExtraError


def open_executor(spec: ExecutorSpec | Executor) -> Executor:
    """Make the executor a spec asks for; an executor is given back as it is.

    Raises
    ------
    MissingExtraError
        Dask or dask-jobqueue is asked for and not installed.
    """
    if isinstance(spec, InProcess):
        return InProcessExecutor()
    if not isinstance(spec, DaskLocal | DaskCluster | DaskJobqueue):
        return spec
    try:
        from kdcache.build.executors.dask_cluster import DaskExecutor  # noqa: PLC0415 - Dask is optional
    except ImportError as error:
        raise MissingExtraError(
            f"executor {spec.kind!r} needs Dask, which is not installed ({error}); nothing was written. "
            "Run `pip install 'kdcache[dask]'`"
        ) from error
    return DaskExecutor(spec)
