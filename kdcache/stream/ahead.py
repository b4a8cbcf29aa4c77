"""Making things ahead of use, on one thread, in their order."""

from __future__ import annotations

__all__ = ["made_ahead"]

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from kdcache.threads import LoopThreads

Step = TypeVar("Step")
Made = TypeVar("Made")

_MOST_AT_ONCE = 8
_SECONDS_AT_ONCE = 0.005
"""Handing over between threads takes about 0.05 ms, several times that on a busy machine: as long as making a batch of
rows in memory. So what is made that quickly, and is therefore small, is handed over some at a time."""


def made_ahead(
    make: Callable[[Step], Made],
    steps: Iterator[Step],
    *,
    depth: int,
    one_by_one: bool = False,
    release: Callable[[], None] = lambda: None,
) -> Generator[Made]:
    """Yield what is made of each step, in order, while the next are made on a thread.

    What was made before a step failed, or before `steps` did, is given before the error is raised. Left early, nothing
    more is made.

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
    release : callable () -> None, optional
        Called when `make` is over and is not called again: before this ends, but where `make` takes longer than
        anyone waits for it.
    """
    asked = _Asked(make, steps, is_one_by_one=one_by_one)
    try:
        # The first alone: what comes behind would take the interpreter from who waits for it. Those that are made one
        # by one wait for other processes, which all begin at once.
        asked.ask(depth if one_by_one else 1)
        while asked.waiting:
            done = asked.next()
            if done.error is None:
                asked.ask(depth)
            yield from done.made
            if done.error is not None:
                raise done.error
        if asked.failed is not None:
            raise asked.failed
    finally:
        asked.leave(release)


class _Asked(Generic[Step, Made]):
    """What is asked of a thread and not given yet."""

    def __init__(self, make: Callable[[Step], Made], steps: Iterator[Step], *, is_one_by_one: bool) -> None:
        self.waiting: deque[Future[_Bunch[Made]]] = deque()
        self.failed: Exception | None = None
        self._make = make
        self._steps = steps
        self._is_one_by_one = is_one_by_one
        self._at_once, self._num_waiting = 1, 0
        self._is_left = False
        self._threads = LoopThreads(1, "kdcache-ahead")

    def ask(self, num_steps: int) -> None:
        """Ask until so many are being made or wait, where there are steps; what they raise is kept in `failed`."""
        while self._num_waiting < num_steps and (bunch := self._next_steps()):
            self.waiting.append(self._threads.submit(self._made, bunch))
            self._num_waiting += len(bunch)

    def _next_steps(self) -> list[Step]:
        steps: list[Step] = []
        try:
            while self.failed is None and len(steps) < self._at_once:
                steps.append(next(self._steps))
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 - raised where what was asked for before it has been given
            self.failed = error
        return steps

    def next(self) -> _Bunch[Made]:
        """Wait for the bunch that comes next."""
        done = self.waiting.popleft().result()
        self._num_waiting -= done.num_steps
        self._at_once = 1 if self._is_one_by_one else done.number_for(_SECONDS_AT_ONCE)
        return done

    def leave(self, release: Callable[[], None]) -> None:
        """Have nothing more made; what is being made is of use to nobody."""
        self._is_left = True
        self._threads.leave(release)

    def _made(self, steps: list[Step]) -> _Bunch[Made]:
        start = time.perf_counter()
        made: list[Made] = []
        error = None
        try:
            for step in steps:
                if self._is_left:
                    break
                made.append(self._make(step))
        except Exception as failed:  # noqa: BLE001 - raised where what was made before it has been given
            error = failed
        return _Bunch(made, len(steps), time.perf_counter() - start, error)


@dataclass(frozen=True, eq=False)
class _Bunch(Generic[Made]):
    made: list[Made]
    num_steps: int
    seconds: float
    error: Exception | None

    def number_for(self, seconds: float) -> int:
        """Say how many such could be made in some time: from 1 to 8."""
        return max(1, min(_MOST_AT_ONCE, int(seconds * self.num_steps / max(self.seconds, 1e-9))))
