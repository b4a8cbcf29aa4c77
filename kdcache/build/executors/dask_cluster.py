"""Tasks on a Dask cluster: one on this machine, one by address, or one asked of a batch system.

Dask is trusted with nothing but running functions. A worker's death can run a task twice or lose it; both are harmless,
because a shard is published first-writer-wins and completion is read from the store. Work that was lost with its
workers is submitted again, as long as each round gets something done.
"""

from __future__ import annotations

__all__ = ["DaskExecutor", "spans"]

import contextlib
import importlib
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType
from typing import Any, Self

import cloudpickle
import dask
import torch
from distributed import Client, LocalCluster, as_completed, get_worker
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from kdcache.build.pilot import Pilot, run_pilot
from kdcache.build.work import Work
from kdcache.documents import DaskCluster, DaskJobqueue, DaskLocal, Record
from kdcache.errors import ExecutorError, MissingExtraError
from kdcache.store import CacheStore

MAX_FRUITLESS_ROUNDS = 3
"""Rounds of resubmission without a single new shard after which the build gives up."""

CONNECT_SECONDS = 20.0
"""How long a scheduler is waited for."""

WORKER_SECONDS = 60.0
"""How long the first worker of a running cluster is waited for; a batch system's is waited for as long as it takes."""

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
        # daemonic workers could not start the processes that load examples (num_workers)
        self._stack.enter_context(dask.config.set({"distributed.worker.daemon": False}))
        self._client = self._stack.enter_context(open_client(self._spec))
        try:
            self._wait_for_worker()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnect, and stop the cluster where it is ours."""
        self._stack.close()

    def _wait_for_worker(self) -> None:
        """Wait for a first worker: a batch system's as long as it takes, a running cluster's for a while."""
        timeout = None if isinstance(self._spec, DaskJobqueue) else WORKER_SECONDS
        try:
            self._client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise ExecutorError(
                f"the Dask scheduler has no workers, and none came within {WORKER_SECONDS:.0f} seconds; nothing was "
                "written by this run. Start some (`dask worker ADDRESS`) and run the same command again"
            ) from error

    def pilot(self, work: Work, name: str, *, with_curve: bool = False) -> Pilot:
        """Run the pilot on a worker, on another one where the first is lost."""
        lost: Exception | None = None
        for _ in range(MAX_FRUITLESS_ROUNDS):
            sent = self._client.scatter(_Parcel.of(work), broadcast=True, hash=False)
            future = self._client.submit(_run_pilot, sent, name, with_curve, pure=False, resources=self._resources)
            try:
                pilot: Pilot = future.result()
            except (KilledWorker, FutureCancelledError) as error:
                lost = error
            else:
                return pilot
        raise ExecutorError(
            f"the pilot of teacher {name!r} was lost with its workers {MAX_FRUITLESS_ROUNDS} times: {lost}. Nothing of "
            "this teacher was written. Look at the workers' logs (memory?), then run the same command again"
        ) from lost

    def run(self, work: Work, tasks: Mapping[str, Sequence[int]], on_record: Callable[[Record], None]) -> None:
        """Run all tasks; see `Executor.run`."""
        remaining = {(name, shard) for name, shards in tasks.items() for shard in shards}
        if not remaining:
            return
        fruitless, last_loss = 0, ""
        while remaining and fruitless < MAX_FRUITLESS_ROUNDS:
            before = len(remaining)
            last_loss = self._round(self._client, work, remaining, on_record) or last_loss
            fruitless = fruitless + 1 if len(remaining) == before else 0
        if remaining:
            shown = ", ".join(f"{name}/{shard}" for name, shard in sorted(remaining)[:5])
            raise ExecutorError(
                f"cache {work.address}: {len(remaining)} shard(s) could not be built ({shown}, ...): workers were lost "
                f"{MAX_FRUITLESS_ROUNDS} times in a row without finishing one. Last: {last_loss}. Everything "
                "published is kept. Look at the workers' logs (memory?), then run the same command again"
            )

    def _round(
        self, client: Client, work: Work, remaining: set[tuple[str, int]], on_record: Callable[[Record], None]
    ) -> str:
        """Submit what remains once; take out of `remaining` what got done. Gives what was lost, in words."""
        futures = self._submit(client, work, remaining)
        lost = ""
        for future in as_completed(futures, loop=client.loop):
            try:
                records = future.result()
            except (
                KilledWorker,
                FutureCancelledError,
            ) as error:  # even a finished task loses its result with its worker
                lost = str(error)
                continue
            except BaseException:
                client.cancel(futures)
                raise
            for record in records:
                remaining.discard((record.teacher, record.shard_index))
                on_record(record)
        self._discard_published(work, remaining, on_record)
        return lost

    def _submit(self, client: Client, work: Work, remaining: set[tuple[str, int]]) -> list[Any]:
        sent = client.scatter(_Parcel.of(work), broadcast=True, hash=False)
        return [
            client.submit(_run_span, sent, name, shards, pure=False, resources=self._resources)
            for name, shards in spans(work, remaining)
        ]

    @property
    def _resources(self) -> dict[str, float] | None:
        return getattr(self._spec, "resources", None) or None

    @staticmethod
    def _discard_published(work: Work, remaining: set[tuple[str, int]], on_record: Callable[[Record], None]) -> None:
        store = CacheStore.at(work.address)
        for name, shard in sorted(remaining):
            record = store.record(name, shard)
            if record is not None:
                remaining.discard((name, shard))
                on_record(record)


def spans(work: Work, tasks: set[tuple[str, int]]) -> Iterator[tuple[str, list[int]]]:
    """Group tasks into spans of neighbouring shards that fill at least one inference batch, so none runs twice much."""
    per_span = max(1, -(-2 * work.plan.batch_size // work.plan.cache.shard_rows))
    for name in sorted({name for name, _ in tasks}):
        shards = sorted(shard for other, shard in tasks if other == name)
        for start in range(0, len(shards), per_span):
            yield name, shards[start : start + per_span]


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


_OPENED: dict[str, Work] = {}
_ONE_AT_A_TIME = threading.Lock()
"""A worker's threads share its teachers, and a teacher that one thread leaves gets its training mode back."""


def _run_pilot(parcel: _Parcel, name: str, with_curve: bool) -> Pilot:  # noqa: FBT001 - as Dask submits it
    """Run on a worker: a pilot. Its logits stay there."""
    with _ONE_AT_A_TIME:
        work = parcel.open()
        return replace(run_pilot(work.stored_teacher(name), work.inputs, with_curve=with_curve), kept={})


def _run_span(parcel: _Parcel, name: str, shard_indices: list[int]) -> list[Record]:
    """Run on a worker: tasks of one teacher. Returns only the small records."""
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or get_worker().state.nthreads))
    with _ONE_AT_A_TIME:
        return list(parcel.open().run(name, shard_indices))
