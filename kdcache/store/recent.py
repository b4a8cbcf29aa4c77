"""Recent: the values last used, up to a number of bytes."""

from __future__ import annotations

__all__ = ["Recent"]

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values last used; safe between threads, and empty again in another process, a forked one too.

    Parameters
    ----------
    max_bytes : int
        Bytes to keep; a value larger than that is not kept at all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[type[Recent[Key, Value]], tuple[int]]:
        return type(self), (self._max_bytes,)

    @property
    def num_bytes(self) -> int:
        """Bytes kept now."""
        return self._bytes

    def get(self, key: Key) -> Value | None:
        """Give a value and count it as used; None where it is not kept."""
        with self._own_lock():
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep a value, and drop those used longest ago until all fit."""
        with self._own_lock():
            if key in self._values or num_bytes > self._max_bytes:
                return
            self._values[key] = (value, num_bytes)
            self._bytes += num_bytes
            while self._bytes > self._max_bytes:
                _, (_, freed) = self._values.popitem(last=False)
                self._bytes -= freed

    def _own_lock(self) -> threading.Lock:
        """Give this process's lock: in a forked one, another thread's may stay locked for ever."""
        if self._pid != os.getpid():
            self.__init__(self._max_bytes)  # type: ignore[misc] # as new
        return self._lock
