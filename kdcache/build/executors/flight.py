"""Flight: functions on a Dask cluster, so many at a time, and what became of each.

Dask blames a worker's death on every task that the worker held, running or waiting, and gives a task up once it has
been blamed often enough. So few tasks are sent at a time: who is not there cannot be blamed.
"""

from __future__ import annotations

__all__ = ["Flight", "Loss", "Patience"]

import contextlib
import queue
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from kdcache.errors import ExecutorError

CHECK_SECONDS = 5.0
"""Silence after which scheduler and workers are looked at; it is also how old their count may be."""

RESULT_SECONDS = 30.0
"""How long a small result is waited for; its worker may die before it is fetched, and then the task runs again."""

_LOG_SECONDS = 5
_LOG_LINES = 20
_DEATH = re.compile(r"Worker process \d+ (was killed by \w+ \d+|exited with \w+ \d+)")
_SIGNALS = {
    "was killed by signal 9": " (SIGKILL, which the kernel and Dask send when memory runs out)",
    "was killed by signal 11": " (SIGSEGV: a library crashed)",
}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Loss:
    """A task that did not end.

    Parameters
    ----------
    num_deaths : int
        Workers whose death Dask blames on it; 0 where it was lost without blame.
    said : str
        What Dask says.
    """

    num_deaths: int
    said: str


@dataclass(frozen=True)
class Patience:
    """How long what is missing is waited for, in seconds; None is for ever."""

    scheduler: float
    workers: float | None


class Flight:
    """Sends functions to a cluster.

    Parameters
    ----------
    client : Client
    resources : mapping of str to float, optional
        What a task takes of its worker.
    patience : Patience
    """

    def __init__(self, client: Client, resources: Mapping[str, float] | None, patience: Patience) -> None:
        self._client = client
        self._resources = dict(resources) if resources else None
        self._patience = patience
        self._scheduler: Any = client.scheduler
        self._slots = 0
        self._slots_at = -CHECK_SECONDS
        self._seen_at = time.monotonic()

    def outcomes(
        self, items: Iterable[Item], send: Callable[[Item], Future[Any]], width: Callable[[int], int]
    ) -> Generator[tuple[Item, Any], None, None]:
        """Yield each item with its result, or with a `Loss`, in the order in which they end.

        Parameters
        ----------
        items : iterable
        send : callable (item) -> Future
            Submits an item.
        width : callable (int) -> int
            Says how many may be under way, from the number that the cluster can run at once, one at least; 0 where no
            more are to be sent. What is under way is waited for: Dask does not stop a function that runs, and what it
            does to its worker would be blamed on whatever comes next.

        Raises
        ------
        ExecutorError
            The scheduler was lost, or has had no worker for too long.
        Exception
            What a function raised.
        """
        waiting, under_way = deque(items), dict[Any, tuple[Item, Future[Any]]]()
        landed: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < (most := width(max(1, self.num_slots()))):
                    self._launch(waiting.popleft(), send, under_way, landed)
                if waiting and not most:
                    waiting.clear()
                    continue
                future = self._next(landed)
                if future is None:
                    continue
                outcome = _outcome(future)
                if outcome is _UNKNOWN:
                    future.add_done_callback(landed.put)
                    continue
                item, _ = under_way.pop(future.key)
                if isinstance(outcome, Loss) and not outcome.num_deaths:
                    self._wait_for_scheduler()
                yield item, outcome
        finally:
            with contextlib.suppress(Exception):  # nothing is kept of what is under way, on whatever is left
                self._client.cancel([future for _, future in under_way.values()])

    def wait_for_workers(self) -> None:
        """Wait for a first worker that can run a task.

        Raises
        ------
        ExecutorError
            None came.
        """
        self._seen_at = time.monotonic()
        while not self.num_slots(fresh=True):
            self._check_workers()
            time.sleep(0.1)

    def num_slots(self, *, fresh: bool = False) -> int:
        """Count the tasks that the cluster can run at once, as of a few seconds ago."""
        if fresh or time.monotonic() - self._slots_at > CHECK_SECONDS:
            workers = self._workers()
            self._slots = sum(self._slots_of(worker) for worker in workers.values())
            self._slots_at = time.monotonic()
            if self._slots:
                self._seen_at = self._slots_at
        return self._slots

    def last_death(self) -> str:
        """Say how the last worker ended, as the processes that watch over workers know it; "" where none knows."""
        with contextlib.suppress(Exception):  # a report is none the worse without it
            # not get_worker_logs: it waits half a minute for workers that are gone
            scheduler: Any = self._client.scheduler
            logs = self._client.sync(
                scheduler.worker_logs,
                n=_LOG_LINES,
                workers=None,
                nanny=True,
                callback_timeout=_LOG_SECONDS,
            )
            lines = sorted(line for found in logs.values() for _, line in found if _DEATH.search(line))
            if lines and (found := _DEATH.search(lines[-1])):
                return found[1] + _SIGNALS.get(found[1], "")
        return ""

    def _launch(
        self,
        item: Item,
        send: Callable[[Item], Future[Any]],
        under_way: dict[Any, tuple[Item, Future[Any]]],
        landed: queue.SimpleQueue[Future[Any]],
    ) -> None:
        self._wait_for_scheduler()
        future = send(item)
        under_way[future.key] = (item, future)
        future.add_done_callback(landed.put)

    def _next(self, landed: queue.SimpleQueue[Future[Any]]) -> Future[Any] | None:
        """Wait for a future to end; look at the cluster where none does for a while."""
        with contextlib.suppress(queue.Empty):
            return landed.get(timeout=CHECK_SECONDS)
        if not self.num_slots(fresh=True):
            self._check_workers()
        return None

    def _wait_for_scheduler(self) -> None:
        """Give a client that lost its scheduler the time to find it again; Dask stops trying after its own timeout."""
        deadline = time.monotonic() + self._patience.scheduler
        while self._client.status == "connecting" and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._client.status != "running":
            raise self._lost(f"the connection is {self._client.status}")

    def _workers(self) -> Mapping[str, Any]:
        """Ask the scheduler for its workers, for no longer than its patience."""
        self._wait_for_scheduler()
        try:
            self._client.sync(self._scheduler.ncores, callback_timeout=self._patience.scheduler)
            try:
                info = self._client.scheduler_info(n_workers=-1)
            except TypeError:  # of earlier releases of Dask, which give all
                info = self._client.scheduler_info()
        except (TimeoutError, OSError, RuntimeError) as error:
            raise self._lost(f"it gives no answer within {self._patience.scheduler:.0f} seconds ({error})") from error
        workers: Mapping[str, Any] = info["workers"]
        return workers

    def _slots_of(self, worker: Mapping[str, Any]) -> int:
        offered = worker.get("resources") or {}
        limits = [int(offered.get(name, 0) // need) for name, need in (self._resources or {}).items() if need]
        return min([int(worker["nthreads"]), *limits])

    def _check_workers(self) -> None:
        limit = self._patience.workers
        if limit is None or time.monotonic() - self._seen_at < limit:
            return
        asked = "".join(f" --resources {name}={need:g}" for name, need in (self._resources or {}).items())
        wanted = f"no workers that offer {self._resources}" if self._resources else "no workers"
        raise ExecutorError(
            f"the Dask scheduler has {wanted}, and none came within {limit:.0f} seconds; what is published is kept. "
            f"Start some (`dask worker ADDRESS{asked}`) and run the same command again"
        )

    def _lost(self, found: str) -> ExecutorError:
        return ExecutorError(
            f"the Dask scheduler at {self._scheduler.address} was lost: {found}. What is published is kept. Start the "
            "scheduler and its workers again, or use another executor, and run the same command again"
        )


_UNKNOWN = object()


def _outcome(future: Future[Any]) -> Any:
    """Give a future's result, its loss, or `_UNKNOWN` where its result was lost and is computed again."""
    try:
        return future.result(timeout=RESULT_SECONDS)
    except KilledWorker as error:
        is_own = error.task == future.key  # else of a task that it waits for
        return Loss(error.allowed_failures + 1 if is_own else 0, str(error).split(". Inspecting", maxsplit=1)[0])
    except FutureCancelledError as error:
        return Loss(0, str(error))
    except TimeoutError:
        if future.status == "error":  # the function's own
            raise
        return _UNKNOWN
