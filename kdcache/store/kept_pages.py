"""Kept pages: a bounded local cache of what was read from objects that lie far away.

Objects are cut into *pages* of a mebibyte. Whatever is read of an object is taken from its pages, which are fetched
when they are first needed, a few of a kind in one request, and kept as files of a local folder; those used longest ago
are dropped where all would take more than was allowed. A page carries a CRC-32C: one that was altered is fetched again.
Only objects that never change once they stand are kept, under a name that tells the cache by its content.
"""

from __future__ import annotations

__all__ = ["KeptPages"]

import contextlib
import hashlib
import os
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c

from kdcache.errors import OptionError, StoreError
from kdcache.store.objects import Objects

PAGE_BYTES = 2**20
_CHECKED = 0x48674BC7  # CRC-32C of bytes with their own behind them
_KEPT_AFTER_DROPPING = 0.9


class KeptPages:
    """Objects of which the pages that were read are kept locally; safe between threads, and processes may share it.

    Parameters
    ----------
    objects : Objects
        Where the objects are.
    folder : path
        Made where it does not stand. It may serve many caches.
    identity : str
        Tells the cache by its content, such as a digest over it.
    max_bytes : int
        What the folder may take, at least 16 pages; while a page is written, one more for each thread.

    Raises
    ------
    OptionError
        `max_bytes` is below 16 MiB.
    """

    def __init__(self, objects: Objects, folder: str | os.PathLike[str], *, identity: str, max_bytes: int) -> None:
        if max_bytes < 16 * PAGE_BYTES:
            raise OptionError(f"a local cache of {max_bytes} bytes holds too little; give at least {16 * PAGE_BYTES}")
        self._objects = objects
        self._folder = Path(folder)
        self._identity = identity
        self._max_bytes = max_bytes
        self._num_bytes: int | None = None
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where the objects are."""
        return self._objects.address

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self._objects, self._folder, self._identity, self._max_bytes)

    def publish(self, key: str, data: bytes) -> bool:
        """As the objects'."""
        return self._objects.publish(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """As the objects'."""
        self._objects.replace(key, data)

    def delete(self, key: str) -> bool:
        """As the objects'."""
        return self._objects.delete(key)

    def read(self, key: str) -> bytes:
        """Read a whole object, where it is."""
        return self._objects.read(key)

    def size(self, key: str) -> int | None:
        """Give an object's size in bytes, or None when none stands under `key`."""
        return self._objects.size(key)

    def list(self, prefix: str) -> Iterator[str]:
        """As the objects'."""
        return self._objects.list(prefix)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read up to `length` bytes from byte `start`, through the pages."""
        return next(self.read_ranges(key, [(start, length)]))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield ranges of one object, (start, length) in bytes, through the pages.

        Raises
        ------
        FileNotFoundError
            No object stands under `key`, and not all of its pages that are needed are kept.
        StoreError
            The folder cannot be written to.
        """
        for start, length in ranges:
            yield self._range(key, start, length)

    def _range(self, key: str, start: int, length: int) -> bytes:
        first, last = start // PAGE_BYTES, (start + max(length, 1) - 1) // PAGE_BYTES
        pages: dict[int, bytes] = {}
        for number in range(first, last + 1):
            page = self._kept(key, number)
            if page is None:
                pages |= self._fetched(key, number, last)
                break
            pages[number] = page
            if len(page) < PAGE_BYTES:  # the object ends here
                break
        data = b"".join(pages[number] for number in sorted(pages))
        return data[start - first * PAGE_BYTES :][:length]

    def _fetched(self, key: str, first: int, last: int) -> dict[int, bytes]:
        """Fetch neighbouring pages in one request, and keep them."""
        data = self._objects.read_range(key, first * PAGE_BYTES, (last - first + 1) * PAGE_BYTES)
        pages = {
            first + place: data[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
            for place in range(-(-len(data) // PAGE_BYTES))
        }
        for number, page in pages.items():
            self._keep(key, number, page)
        return pages

    def _path(self, key: str, number: int) -> Path:
        name = hashlib.blake2b(f"{self._identity}\n{key}\n{number}".encode(), digest_size=20).hexdigest()
        return self._folder / name[:2] / f"{name}.page"

    def _kept(self, key: str, number: int) -> bytes | None:
        path = self._path(key, number)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if google_crc32c.value(data) != _CHECKED:
            path.unlink(missing_ok=True)
            return None
        return data[:-4]

    def _keep(self, key: str, number: int, page: bytes) -> None:
        path = self._path(key, number)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(page + struct.pack("<I", google_crc32c.value(page)))
            partial.rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StoreError(
                f"{path} could not be written ({error}): the local cache has no room or may not be written to. "
                "Nothing else was changed. Free some, give another folder, or open the cache without a local one"
            ) from error
        self._account(len(page) + 4)

    def _account(self, added_bytes: int) -> None:
        """Add to what the folder takes, and drop what was used longest ago where that is too much."""
        with self._lock:
            if self._num_bytes is not None:
                self._num_bytes += added_bytes
            if self._num_bytes is None or self._num_bytes > self._max_bytes:
                self._num_bytes = self._dropped()

    def _dropped(self) -> int:
        """Count the pages as they lie, and drop the oldest where they take too much; gives the bytes that stay."""
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*/*.page"):
            with contextlib.suppress(FileNotFoundError):  # another process dropped it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._max_bytes:
            return total
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            total -= size
            if total <= self._max_bytes * _KEPT_AFTER_DROPPING:
                break
        return total


def _again(objects: Objects, folder: Path, identity: str, max_bytes: int) -> KeptPages:
    return KeptPages(objects, folder, identity=identity, max_bytes=max_bytes)
