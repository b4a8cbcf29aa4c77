"""Locks that a forked process finds open."""

from __future__ import annotations

__all__ = ["OwnLock"]

import os
import threading
from types import TracebackType


class OwnLock:
    """A lock between the threads of one process; in a forked one it is open, whoever held it when it was forked."""

    def __init__(self) -> None:
        self._renew()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._renew()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
