"""Bucket objects: a cache in an object store, such as S3.

What is promised, and where it ends, is docs/design/0008-object-stores.md.
"""

from __future__ import annotations

__all__ = ["BucketObjects"]

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.store.bucket_address import DEFAULT_LIMITS, BucketAddress, RequestLimits
from kdcache.store.bucket_client import (
    AlreadyStandsError,
    BucketClient,
    Client,
    Listed,
    RefusedRangeError,
    UnansweredError,
    UnsupportedError,
)
from kdcache.store.claims import publish_claimed
from kdcache.store.keys import check_key, is_hidden
from kdcache.store.locks import Renewed

MAX_OBJECT_BYTES = 5 * 2**30
"""What all stores take in one request. Parts that are put together later cannot be create-only everywhere."""
_PROBE = ".create-only"
_MAX_GAP_BYTES = 2**20
"""Ranges that lie no further apart are read as one: a request costs about as much as so many bytes."""
_BATCH_BYTES = 2**25
"""Ranges asked for at once: what a reader holds in memory."""
_MAX_KNOWN_SIZES = 2**16

Answer = TypeVar("Answer")


class BucketObjects:
    """Objects of a bucket, below a prefix; safe between threads. Nothing is asked before the first call.

    Objects appear whole, in one request each, and last when `publish` returns. A server that refuses to replace (it
    honours ``If-None-Match: *``, as S3 does) decides which of several writers wins. One that ignores this is noticed,
    before the first publishing, by storing the object ``.create-only`` twice; there writers keep out of one
    another's way by claims, which needs listings that show at once what was stored (`kdcache.store.claims`).

    A writer whose request was carried out and whose answer was lost finds its own bytes and is told True. Of two
    writers of equal bytes at the same time both may be told so.

    Sent to another process, it is its address alone, and credentials are looked up there. A process that was forked
    from one that used a store makes its requests through a process of its own (`kdcache.store.relay`).

    Parameters
    ----------
    address : str
        ``s3://BUCKET/PREFIX``, ``gs://...`` or ``az://CONTAINER/PREFIX``. Credentials come from the environment.
    limits : RequestLimits
        How long to wait, and how often to try.

    Raises
    ------
    StoreError
        The address names no bucket, or holds credentials.
    """

    def __init__(self, address: str, limits: RequestLimits = DEFAULT_LIMITS) -> None:
        self._address = BucketAddress.parse(address)
        self._limits = limits
        self.renew()
        Renewed.add(self)

    def renew(self) -> None:
        """Know nothing yet, as in a process that was forked from the one that knew."""
        self._lock = threading.Lock()
        self._opened: Client | None = None
        self._refuses_to_replace: bool | None = None
        self._sizes: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"BucketObjects({self.address!r})"

    def __reduce__(self) -> tuple[type[BucketObjects], tuple[str, RequestLimits]]:
        return type(self), (self.address, self._limits)

    request_bytes = _MAX_GAP_BYTES

    @property
    def address(self) -> str:
        """The address, without a slash at its end."""
        return str(self._address)

    @property
    def client(self) -> Client:
        """The connection of this process; opened when first asked for.

        Raises
        ------
        MissingExtraError
            obstore is not installed.
        StoreError
            The environment's settings do not do.
        """
        with self._lock:
            if self._opened is None:
                self._opened = self._connected()
            return self._opened

    def _connected(self) -> Client:
        if not BucketClient.is_cut_off():
            return BucketClient(self._address, self._limits)
        from kdcache.store.relay import Relay  # noqa: PLC0415 - for forked processes alone

        return Relay(self._address, self._limits)

    def publish(self, key: str, data: bytes) -> bool:
        """Store an object unless one stands under `key`; True when these bytes were stored.

        Raises
        ------
        StoreError
            The store could not be reached or refused, or the object is larger than 5 GiB.
        """
        check_key(key)
        if len(data) > MAX_OBJECT_BYTES:
            raise StoreError(
                f"{self.address}/{key} has {len(data):,} bytes, and an object may have {MAX_OBJECT_BYTES:,}; nothing "
                "was stored. Build with smaller shard_rows="
            )
        if self.client.size(key) is not None:  # spares sending what would be refused
            return False
        self._sizes.pop(key, None)
        if not self._server_refuses_to_replace():
            return publish_claimed(self.client, key, data, self._limits)
        return self._created(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """Store an object in place of whatever stands under `key`, atomically; durable on return."""
        check_key(key)
        self._sizes.pop(key, None)
        self._trying(lambda: self.client.put(key, data, create_only=False))

    def delete(self, key: str) -> bool:
        """Remove an object; False when none stood there."""
        check_key(key)
        self._sizes.pop(key, None)
        if self.client.size(key) is None:
            return False
        self.client.delete(key)
        return True

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object; FileNotFoundError when none stands under `key`, TooLargeError where it is larger."""
        check_key(key)
        return self.client.read(key, max_bytes=max_bytes)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read up to `length` bytes from byte `start`; FileNotFoundError when nothing stands under `key`."""
        return next(self.read_ranges(key, [(start, length)])).tobytes()

    def read_sized(self, key: str, start: int, length: int, *, believed_bytes: int) -> tuple[bytes, int]:
        """Read as `read_range`, and tell the object's size, in one request where it is as large as believed."""
        check_key(key)
        if 0 <= start < start + length <= believed_bytes:
            try:
                data, size = self.client.read_sized(key, start, length)
            except RefusedRangeError:  # it is smaller
                self._sizes.pop(key, None)
            else:
                self._remember(key, size)
                return data, size
        standing = self.size(key)
        return self.read_range(key, start, length), standing or 0

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield ranges of one object, (start, length) in bytes; those near to one another are read together.

        At most 32 MiB, or a single range, are held at a time. FileNotFoundError when nothing stands under `key`.
        """
        check_key(key)
        for batch in _batches(ranges):
            try:
                parts = self._fetched(key, batch)
            except RefusedRangeError:
                if self._sizes.pop(key, None) is None:
                    raise
                parts = self._fetched(key, batch)  # another object stands there than the one whose size was known
            yield from parts

    def size(self, key: str) -> int | None:
        """Give an object's size in bytes, or None when none stands under `key`."""
        check_key(key)
        size = self.client.size(key)
        if size is None:
            self._sizes.pop(key, None)
        else:
            self._remember(key, size)
        return size

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys below the folder `prefix` ("" for all), sorted by path component; hidden ones never."""
        yield from sorted((found.path for found in self._listed(prefix)), key=lambda path: path.split("/"))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Give the size in bytes of each object below the folder `prefix` ("" for all), as a listing tells it."""
        return {found.path: found.num_bytes for found in self._listed(prefix)}

    def is_empty(self) -> bool:
        """Tell whether nothing stands at the address, hidden objects aside; asks page by page, to the first one."""
        return self.client.is_empty()

    def forget(self, key: str) -> int:
        """Drop nothing but the object's size: objects are read where they stand."""
        self._sizes.pop(key, None)
        return 0

    def _listed(self, prefix: str) -> Sequence[Listed]:
        if prefix:
            check_key(prefix)
        return [found for found in self.client.list(prefix) if not is_hidden(found.path)]

    def _remember(self, key: str, size: int) -> None:
        if len(self._sizes) >= _MAX_KNOWN_SIZES:
            self._sizes.clear()
        self._sizes[key] = size

    def _fetched(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[npt.NDArray[np.uint8]]:
        """Read ranges, cut where the object ends; servers differ in what they make of ranges beyond it."""
        size = self._sizes.get(key)
        if size is None or any(start + length > size for start, length in ranges):
            size = self.size(key)
        if size is None:
            return [np.frombuffer(self.client.read(key), np.uint8)]  # raises the error of who reads nothing
        cut = [(start, max(0, min(length, size - start))) for start, length in ranges]
        found = iter(self.client.read_ranges(key, [r for r in cut if r[1]], max_gap_bytes=_MAX_GAP_BYTES))
        parts = [np.frombuffer(next(found), np.uint8) if length else np.empty(0, np.uint8) for _, length in cut]
        if any(before + length != start for (before, length), (start, _) in itertools.pairwise(cut)):
            parts = [part.copy() for part in parts]  # a part of a joined range would keep the whole of it
        if any(len(part) < length for part, (_, length) in zip(parts, cut, strict=True)):
            raise RefusedRangeError(f"{self.address}/{key} is shorter than it was when its size was asked")
        return parts

    def _server_refuses_to_replace(self) -> bool:
        """Tell whether the server honours create-only requests: a second one for the same object must fail."""
        with self._lock:
            known = self._refuses_to_replace
        if known is None:
            known = self._trying(self._probed)
            self._refuses_to_replace = known
        return known

    def _probed(self) -> bool:
        try:
            for _ in range(2):
                self.client.put(_PROBE, b"Tells whether this server refuses to replace objects.\n", create_only=True)
        except AlreadyStandsError:
            return True
        except UnsupportedError:
            return False
        return False

    def _created(self, key: str, data: bytes) -> bool:
        """Create an object, and find out who did where an answer was lost."""
        deadline = time.monotonic() + self._limits.retry_seconds
        wait_seconds = self._limits.first_wait_seconds
        while True:
            try:
                self.client.put(key, data, create_only=True)
            except AlreadyStandsError:
                is_ours = self._stands(key, data)  # a try whose answer was lost may have been carried out
            except UnansweredError:
                is_ours = self._stands(key, data)
                if is_ours is None and time.monotonic() + wait_seconds > deadline:
                    raise
            else:
                return True
            if is_ours is not None:
                return is_ours
            time.sleep(wait_seconds)
            wait_seconds *= 2

    def _stands(self, key: str, data: bytes) -> bool | None:
        """Tell whether these bytes stand there, or others; None where nothing does."""
        try:
            return self.client.read(key) == data
        except FileNotFoundError:
            return None

    def _trying(self, request: Callable[[], Answer]) -> Answer:
        """Try again what may be repeated: obstore does where a server fails, not where it is silent."""
        deadline = time.monotonic() + self._limits.retry_seconds
        wait_seconds = self._limits.first_wait_seconds
        while True:
            try:
                return request()
            except UnansweredError:
                if time.monotonic() + wait_seconds > deadline:
                    raise
            time.sleep(wait_seconds)
            wait_seconds *= 2


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Part ranges so that what is read for each part, gaps included, is bounded."""
    batch: list[tuple[int, int]] = []
    batch_bytes = 0
    for start, length in ranges:
        if batch and batch_bytes + length + _MAX_GAP_BYTES > _BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        gap = start - (batch[-1][0] + batch[-1][1]) if batch else 0
        batch.append((start, length))
        batch_bytes += length + min(max(0, gap), _MAX_GAP_BYTES)
    if batch:
        yield batch
