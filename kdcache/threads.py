"""Threads that a loop works with, and how it leaves them, wherever Python ends it."""

from __future__ import annotations

__all__ = ["LoopThreads"]

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

_SECONDS_TO_LEAVE = 5.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class LoopThreads:
    """Threads of one loop, such as a generator, which ends with it.

    A loop that is left in a cycle, with an error's traceback say, is ended by the garbage collector, wherever that
    runs: within the start of another thread, which holds a lock that the end of any thread needs; in one of these
    threads; in a process that was forked meanwhile, where none of them is. So nobody waits for threads here, only for
    what they are at, and for that not for ever.

    Parameters
    ----------
    num_threads : int
    name : str
        Of the threads, for people.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._process = os.getpid()
        own = self._own = set[int]()
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix=name, initializer=lambda: own.add(threading.get_ident())
        )

    def submit(
        self, work: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Have something done by the next thread that is free."""
        return self._pool.submit(work, *args, **kwargs)

    def leave(self, asked: Iterable[Future[Any]]) -> list[Future[Any]]:
        """Have nothing more begun, and wait some seconds for what is under way; gives what goes on behind that.

        Parameters
        ----------
        asked : iterable of Future
            What was submitted and is of no use any more.
        """
        begun = [future for future in asked if not future.cancel()]
        if self._process != os.getpid():
            return begun
        self._pool.shutdown(wait=False, cancel_futures=True)
        if threading.get_ident() not in self._own:
            wait(begun, _SECONDS_TO_LEAVE)
        return [future for future in begun if not future.done()]
