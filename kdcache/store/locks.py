"""Locks, and all else that threads share, made anew in a forked process, whatever another thread held."""

from __future__ import annotations

__all__ = ["OwnLock", "Renewed"]

import os
import threading
import weakref
from types import TracebackType
from typing import ClassVar, Protocol


class _Renewable(Protocol):
    def renew(self) -> None: ...


class Renewed:
    """Objects that are told when they wake up in a forked process, before any of its threads runs."""

    _all: ClassVar[weakref.WeakSet[_Renewable]] = weakref.WeakSet()

    @classmethod
    def add(cls, renewable: _Renewable) -> None:
        """Have `renewable.renew()` called in every forked process."""
        cls._all.add(renewable)

    @classmethod
    def renew_all(cls) -> None:
        """Renew all; called by Python in the forked process."""
        for renewable in list(cls._all):
            renewable.renew()


if hasattr(os, "register_at_fork"):  # not where processes cannot be forked
    os.register_at_fork(after_in_child=Renewed.renew_all)


class OwnLock:
    """A lock between the threads of one process; in a forked one it is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        Renewed.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OwnLock], tuple[()]]:
        return OwnLock, ()  # another process has its own

    def renew(self) -> None:
        """Be open, whoever held the lock when this process was forked."""
        self._lock = threading.Lock()
