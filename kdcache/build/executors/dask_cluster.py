"""Tasks on a Dask cluster: one on this machine, one by address, or one asked of a batch system.

Dask is trusted with nothing but running functions. A worker's death can run a task twice or lose it; both are harmless,
because a shard is published first-writer-wins and completion is read from the store. What becomes of work that is lost
with its workers says `rounds`.
"""

from __future__ import annotations

__all__ = ["DaskExecutor"]

import contextlib
import importlib
import logging
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType
from typing import Any, Self

import cloudpickle
import dask
import torch
from distributed import Client, Future, LocalCluster, get_worker

from kdcache.build.executors.flight import Flight, Loss, Patience
from kdcache.build.executors.rounds import Rounds
from kdcache.build.failures import FailedShard
from kdcache.build.pilot import Pilot, run_pilot
from kdcache.build.work import Work
from kdcache.documents import DaskCluster, DaskJobqueue, DaskLocal, Record
from kdcache.errors import ExecutorError, MissingExtraError, TeacherError

ALLOWED_FAILURES = 1
"""Deaths that Dask overlooks before it gives a task up, on clusters that are started here; the next one is counted."""

MAX_LOST_PILOTS = 3
"""Times that a pilot is lost with its worker before the build gives up."""

CONNECT_SECONDS = 20.0
"""How long a scheduler is waited for."""

WORKER_SECONDS = 60.0
"""How long the first worker of a running cluster is waited for; a batch system's is waited for as long as it takes."""

_USABLE = frozenset({"pending", "finished"})

ClusterSpec = DaskLocal | DaskCluster | DaskJobqueue


class DaskExecutor:
    """Runs tasks on a Dask cluster.

    Parameters
    ----------
    spec : DaskLocal, DaskCluster or DaskJobqueue
        Which cluster. A cluster that is started here is stopped here.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Connect to the cluster, starting it where it is ours."""
        self._stack.enter_context(dask.config.set(_settings(self._spec)))
        self._stack.enter_context(_quiet())
        try:
            self._client = self._stack.enter_context(open_client(self._spec))
            self._flight = Flight(self._client, self._resources, self._patience)
            self._flight.wait_for_workers()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnect, and stop the cluster where it is ours."""
        self._stack.close()

    def pilot(self, work: Work, name: str, *, with_curve: bool = False) -> Pilot:
        """Run the pilot on a worker, on another one where the first is lost."""
        sent = self._sent(work)

        def send(_: int) -> Future[Any]:
            nonlocal sent
            sent = self._usable(sent, work)
            return self._submit(_run_pilot, sent, name, with_curve)

        outcomes = self._flight.outcomes(range(MAX_LOST_PILOTS), send, lambda _: 1)
        with contextlib.closing(outcomes):
            for _, outcome in outcomes:
                if isinstance(outcome, Pilot):
                    return outcome
                lost: Loss = outcome
        raise ExecutorError(
            f"the pilot of teacher {name!r} was lost with its workers {MAX_LOST_PILOTS} times: {lost.said}. Nothing of "
            "this teacher was written. Look at the workers' logs (memory?), then run the same command again"
        )

    def run(self, work: Work, tasks: Mapping[str, Sequence[int]], on_record: Callable[[Record], None]) -> None:
        """Run all tasks; see `Executor.run`.

        Raises
        ------
        ExecutorError
            Shards whose tasks kill their workers are in quarantine, or the cluster was lost.
        Exception
            The first error of a task, once all others are built.
        """
        remaining = {(name, shard) for name, shards in tasks.items() for shard in shards}
        if not remaining:
            return
        sent = self._sent(work)

        def send(name: str, shards: tuple[int, ...]) -> Future[Any]:
            nonlocal sent
            sent = self._usable(sent, work)
            return self._submit(_run_span, sent, name, list(shards))

        Rounds(work, remaining, self._flight, send, on_record).run()

    def _sent(self, work: Work) -> Future[Any]:
        """Hand the work to the cluster once, as a task's result: where it is lost, Dask makes it again.

        Scattered data would be lost with the last worker that holds them.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            return self._client.submit(_parcel, _Parcel.of(work), pure=False)

    def _usable(self, sent: Future[Any], work: Work) -> Future[Any]:
        """Hand the work over again if Dask gave it up: it blames workers' deaths on it, too."""
        return sent if sent.status in _USABLE else self._sent(work)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._client.submit(function, *arguments, pure=False, resources=self._resources)

    @property
    def _resources(self) -> dict[str, float] | None:
        return getattr(self._spec, "resources", None) or None

    @property
    def _patience(self) -> Patience:
        """Wait for a batch system's workers as long as it takes, for a running cluster's a while."""
        return Patience(CONNECT_SECONDS, None if isinstance(self._spec, DaskJobqueue) else WORKER_SECONDS)


def _settings(spec: ClusterSpec) -> dict[str, Any]:
    """Give Dask's settings for clusters that are started here."""
    overlooked = min(ALLOWED_FAILURES, dask.config.get("distributed.scheduler.allowed-failures"))
    # daemonic workers could not start the processes that load examples (num_workers)
    settings = {"distributed.worker.daemon": False, "distributed.scheduler.allowed-failures": overlooked}
    if isinstance(spec, DaskLocal):
        # Dask's local cluster looks again a while after a worker's death, and closes the place of one that is away
        # then: also of one that came back and has died a second time. With every place closed no worker ever comes.
        settings["distributed.deploy.lost-worker-timeout"] = "1000 days"
    return settings


def _log_level() -> int:
    """Give the level below which Dask is silent, unless its configuration says what to log."""
    return logging.WARNING if dask.config.get("logging", None) else logging.CRITICAL


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep this process from logging deaths, which are told in our own words; see `_log_level`."""
    with contextlib.ExitStack() as stack:
        if _log_level() == logging.CRITICAL:
            for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
                logger = logging.getLogger(name)
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL)
        yield


@contextlib.contextmanager
def open_client(spec: ClusterSpec) -> Iterator[Client]:
    """Connect to the cluster a spec names, starting and stopping it where it is ours.

    Raises
    ------
    ExecutorError
        There is no scheduler at the address.
    MissingExtraError
        dask-jobqueue is not installed.
    """
    if isinstance(spec, DaskCluster):
        try:
            client = Client(spec.address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ExecutorError(
                f"no Dask scheduler answers at {spec.address}: {error}. Nothing was written by this run. Start one "
                "(`dask scheduler`, `dask worker ADDRESS`), or use another executor"
            ) from error
        with client:
            yield client
        return
    with open_cluster(spec) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def open_cluster(spec: DaskLocal | DaskJobqueue) -> Any:
    """Start a cluster on this machine, or ask a batch system for one."""
    if isinstance(spec, DaskLocal):
        return LocalCluster(
            n_workers=spec.num_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # None would take port 8787, and complain where it is taken
            preload_nanny=[],
            resources=None,
            silence_logs=_log_level(),
            env={"OMP_NUM_THREADS": str(spec.threads_per_worker)},
        )
    dask_jobqueue = _import_jobqueue()
    cluster_class = getattr(dask_jobqueue, spec.cluster, None)
    if cluster_class is None:
        raise ExecutorError(f"dask_jobqueue has no {spec.cluster}; nothing was written by this run")
    try:
        cluster = cluster_class(**spec.options)
    except (TypeError, ValueError, OSError) as error:
        raise ExecutorError(
            f"dask_jobqueue.{spec.cluster}({', '.join(sorted(spec.options))}) cannot be started: {error}. Nothing was "
            "written by this run. Mend the executor's options"
        ) from error
    cluster.scale(jobs=spec.num_jobs)
    return cluster


def _import_jobqueue() -> ModuleType:
    """Import dask-jobqueue, and take Ctrl-C back from it: after its import an interrupted build would exit with 0."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue")
    except ImportError as error:
        raise MissingExtraError(
            "executor 'dask-jobqueue' needs dask-jobqueue, which is not installed; nothing was written. "
            "Run `pip install 'kdcache[jobqueue]'`"
        ) from error
    finally:
        if signal.getsignal(signal.SIGINT) is not interrupt:
            signal.signal(signal.SIGINT, interrupt)


@dataclass(frozen=True, eq=False)
class _Parcel:
    """Work as it travels: opened on the worker only after the folders of its modules are known there."""

    key: str
    folders: tuple[str, ...]
    payload: bytes

    @classmethod
    def of(cls, work: Work) -> _Parcel:
        return cls(secrets.token_hex(8), work.import_folders, cloudpickle.dumps(work))

    def open(self) -> Work:
        """Unpickle once a process; folders are appended to the worker's path, behind what it has."""
        if self.key not in _OPENED:
            sys.path.extend(folder for folder in self.folders if folder not in sys.path)
            _OPENED.clear()
            _OPENED[self.key] = cloudpickle.loads(self.payload)
        return _OPENED[self.key]


def _parcel(parcel: _Parcel) -> _Parcel:
    """Run on a worker: hold the parcel for the tasks that ask for it."""
    return parcel


_OPENED: dict[str, Work] = {}
_ONE_AT_A_TIME = threading.Lock()
"""A worker's threads share its teachers, and a teacher that one thread leaves gets its training mode back."""


def _run_pilot(parcel: _Parcel, name: str, with_curve: bool) -> Pilot:  # noqa: FBT001 - as Dask submits it
    """Run on a worker: a pilot. Its logits stay there."""
    with _ONE_AT_A_TIME:
        work = parcel.open()
        return replace(run_pilot(work.stored_teacher(name), work.inputs, with_curve=with_curve), kept={})


def _run_span(parcel: _Parcel, name: str, shard_indices: list[int]) -> list[Record | FailedShard]:
    """Run on a worker: tasks of one teacher. Returns only the small records, and errors."""
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or get_worker().state.nthreads))
    with _ONE_AT_A_TIME:
        return [_portable(outcome) for outcome in parcel.open().run(name, shard_indices)]


def _portable(outcome: Record | FailedShard) -> Record | FailedShard:
    """Put an error that cannot travel into words."""
    if isinstance(outcome, Record):
        return outcome
    error = outcome.error.with_traceback(None)
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception of any module can fail in any way to be made again
        return replace(outcome, error=TeacherError(f"{type(error).__name__}: {error}"))
    return outcome
