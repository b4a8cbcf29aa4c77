"""Threads that a loop works with, and how it leaves them, wherever Python ends it."""

from __future__ import annotations

__all__ = ["LoopThreads"]

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

SECONDS_TO_LEAVE = 5.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class LoopThreads:
    """Threads of one loop, such as a generator, which ends with it.

    A loop that is left in a cycle, with an error's traceback say, is ended by the garbage collector, wherever that
    runs: within the start of another thread, which holds a lock that the end of any thread needs; in one of these
    threads; in a process that was forked meanwhile, where none of them is. So nobody waits for threads here, only for
    what they are at, and for that not for ever. A program that ends does wait for it.

    Parameters
    ----------
    num_threads : int
    name : str
        Of the threads, for people.
    seconds_to_leave : float, optional
        How long `leave` waits at most.
    """

    _is_program_over = staticmethod(sys.is_finalizing)
    """Held here, since modules lose their names before the last generators end."""

    def __init__(self, num_threads: int, name: str, *, seconds_to_leave: float | None = None) -> None:
        self._process = os.getpid()
        self._seconds_to_leave = seconds_to_leave
        self._lock = threading.RLock()  # the collector may run `leave` in a thread that holds it
        self._num_running = 0
        self._is_idle = threading.Event()
        self._is_left = False
        self._release: Callable[[], None] | None = None
        self._is_idle.set()
        own = self._own = set[int]()
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix=name, initializer=lambda: own.add(threading.get_ident())
        )

    def submit(
        self, work: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Have something done by the next thread that is free."""
        return self._pool.submit(self._run, work, *args, **kwargs)

    def leave(self, release: Callable[[], None] | None = None) -> None:
        """Have nothing more begun, and wait some seconds for what is under way.

        Parameters
        ----------
        release : callable () -> None, optional
            Called once nothing is under way any more, by whoever is last; never in another process.
        """
        if self._is_program_over() or self._process != os.getpid():
            return  # threads have ended, or are in another process
        with self._lock:
            self._is_left = True
            self._release = release
        try:
            self._pool.shutdown(wait=False, cancel_futures=True)
            if threading.get_ident() not in self._own:
                self._is_idle.wait(SECONDS_TO_LEAVE if self._seconds_to_leave is None else self._seconds_to_leave)
        finally:
            self._release_if_idle()

    def _run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self._is_left:
                return None
            self._num_running += 1
            self._is_idle.clear()
        try:
            return work(*args, **kwargs)
        finally:
            with self._lock:
                self._num_running -= 1
                if not self._num_running:
                    self._is_idle.set()
            self._release_if_idle()

    def _release_if_idle(self) -> None:
        with self._lock:
            release, is_over = self._release, self._is_left and not self._num_running
            if is_over:
                self._release = None
        if is_over and release is not None:
            release()
