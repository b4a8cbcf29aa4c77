"""Recent: the values last used, up to a number of bytes."""

from __future__ import annotations

__all__ = ["Recent"]

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from kdcache.store.locks import Renewed

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
        self.renew()
        Renewed.add(self)

    def renew(self) -> None:
        """Keep nothing; what another thread was changing when this process was forked may be half changed."""
        self._bytes = 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Recent[Key, Value]], tuple[int]]:
        return type(self), (self._max_bytes,)

    @property
    def num_bytes(self) -> int:
        """Bytes kept now."""
        return self._bytes

    def get(self, key: Key) -> Value | None:
        """Give a value and count it as used; None where it is not kept."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep a value, and drop those used longest ago until all fit."""
        with self._lock:
            if key in self._values or num_bytes > self._max_bytes:
                return
            self._values[key] = (value, num_bytes)
            self._bytes += num_bytes
            while self._bytes > self._max_bytes:
                _, (_, freed) = self._values.popitem(last=False)
                self._bytes -= freed
