"""Making things ahead of use, on one thread, in their order."""

from __future__ import annotations

__all__ = ["made_ahead"]

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Step = TypeVar("Step")
Made = TypeVar("Made")

_MOST_AT_ONCE = 8
_SECONDS_AT_ONCE = 0.005
"""Handing over between threads takes about 0.05 ms, several times that on a busy machine: as long as making a batch of
rows in memory. So what is made that quickly, and is therefore small, is handed over some at a time."""


def made_ahead(
    make: Callable[[Step], Made], steps: Iterator[Step], *, depth: int, one_by_one: bool = False
) -> Generator[Made]:
    """Yield what is made of each step, in order, while the next are made on a thread.

    What was made before a step failed is given before its error is raised. Left early, nothing more is made.

    Parameters
    ----------
    make : callable (step) -> made
        Called by one thread at a time, in the steps' order.
    steps : iterator
        Asked for in the thread that iterates.
    depth : int
        How many are made ahead of use at least, where there are so many.
    one_by_one : bool
        Ask for each step only when there is room for what is made of it. Else up to eight are asked for and made at
        once where they take less than five milliseconds.
    """
    waiting: deque[Future[_Bunch[Made]]] = deque()
    at_once, num_waiting = 1, 0
    with ThreadPoolExecutor(1, thread_name_prefix="kdcache-ahead") as pool:
        try:
            while True:
                bunch = list(itertools.islice(steps, at_once)) if num_waiting <= depth else []
                if bunch:
                    waiting.append(pool.submit(_make_all, make, bunch))
                    num_waiting += len(bunch)
                if num_waiting <= depth and bunch:
                    continue
                if not waiting:
                    return
                done = waiting.popleft().result()
                num_waiting -= done.num_steps
                at_once = 1 if one_by_one else done.number_for(_SECONDS_AT_ONCE)
                yield from done.made
                if done.error is not None:
                    raise done.error
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True, eq=False)
class _Bunch(Generic[Made]):
    made: list[Made]
    num_steps: int
    seconds: float
    error: Exception | None

    def number_for(self, seconds: float) -> int:
        """Say how many such could be made in some time: from 1 to 8."""
        return max(1, min(_MOST_AT_ONCE, int(seconds * self.num_steps / max(self.seconds, 1e-9))))


def _make_all(make: Callable[[Step], Made], steps: list[Step]) -> _Bunch[Made]:
    start = time.perf_counter()
    made: list[Made] = []
    error = None
    try:
        made.extend(make(step) for step in steps)
    except Exception as failed:  # noqa: BLE001 - raised where what was made before it has been given
        error = failed
    return _Bunch(made, len(steps), time.perf_counter() - start, error)
