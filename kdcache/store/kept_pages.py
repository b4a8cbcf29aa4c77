"""Kept pages: a bounded local cache of what was read from objects that lie far away.

Objects are cut into *pages* of a mebibyte. Whatever is read of an object is taken from its pages, which are fetched
when they are first needed, a few of a kind in one request, and kept as files of a local folder; those used longest ago
are dropped where all would take more than was allowed. A page carries a CRC-32C: one that was altered is fetched again.
Only objects that never change once they stand are kept, under a name that tells the cache by its content, and the
object by its key and its size: what was kept of one that was half copied does not stand for the whole one.

Records are kept as they are read, and are believed once `complete.json` can vouch for each (`kdcache.store.vouched`).
"""

from __future__ import annotations

__all__ = ["KeptPages"]

import contextlib
import errno
import hashlib
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kdcache.errors import OptionError, StoreError
from kdcache.store.checksums import CHECKSUM_BYTES, is_sound, with_checksum
from kdcache.store.layout import GROUPS, METADATA
from kdcache.store.limits import TooLargeError
from kdcache.store.locks import OwnLock
from kdcache.store.objects import Objects
from kdcache.store.vouched import VouchedRecords

PAGE_BYTES = 2**20
_KEPT_AFTER_DROPPING = 0.9
_REQUEST_PAGES = 16
_COUNTS = 16
"""The folder is counted anew whenever a process has added this part of what it may take: others add to it too."""
_STALE_SECONDS = 3600


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
        What the folder may take, at least 16 pages; while a page is written, one more for each thread. Processes
        that share the folder may each add a sixteenth until they see what the others added.
    vouched : mapping of str to VouchedRecords, optional
        What is known of folders of records.

    Raises
    ------
    OptionError
        `max_bytes` is below 16 MiB.
    StoreError
        The folder cannot be made.

    Warns
    -----
    RuntimeWarning
        Once, when a page cannot be written or dropped; what was read is given all the same.
    """

    def __init__(
        self,
        objects: Objects,
        folder: str | os.PathLike[str],
        *,
        identity: str,
        max_bytes: int,
        vouched: Mapping[str, VouchedRecords] | None = None,
    ) -> None:
        if max_bytes < 16 * PAGE_BYTES:
            raise OptionError(f"a local cache of {max_bytes} bytes holds too little; give at least {16 * PAGE_BYTES}")
        self._objects = objects
        self._folder = Path(folder)
        self._identity = identity
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}
        self._vouched = dict(vouched or {})
        self._digests: dict[str, dict[int, str]] = {}
        self._lists: dict[str, bytes] = {}
        self._num_bytes: int | None = None
        self._added_bytes = 0
        self._counting_pid: int | None = None
        self._has_warned = False
        self._lock = OwnLock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the folder {self._folder} of the local cache could not be made ({error}). Nothing was changed. Give "
                "another folder, or open the cache without a local one"
            ) from error

    @property
    def address(self) -> str:
        """Where the objects are."""
        return self._objects.address

    @property
    def request_bytes(self) -> int:
        """As the objects'."""
        return self._objects.request_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self._objects, self._folder, self._identity, self._max_bytes, self._vouched)

    def publish(self, key: str, data: bytes) -> bool:
        """As the objects'."""
        return self._objects.publish(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """As the objects'."""
        self._objects.replace(key, data)

    def delete(self, key: str) -> bool:
        """As the objects'."""
        return self._objects.delete(key)

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object: a shard or a part of the index through the pages, anything else where it is."""
        parent, _, name = key.rpartition("/")
        if parent in self._vouched and name.removesuffix(".json").isdecimal():
            return self._read_record(key, parent, int(name.removesuffix(".json")), max_bytes)
        group, _, rest = key.partition("/")
        if group not in GROUPS or rest.endswith(METADATA):
            return self._objects.read(key, max_bytes=max_bytes)
        size = self._known_size(key)
        if max_bytes is not None and size > max_bytes:
            raise TooLargeError(size)
        return self.read_range(key, 0, size)

    def size(self, key: str) -> int | None:
        """Give an object's size in bytes, or None when none stands under `key`; asks where it is."""
        size = self._objects.size(key)
        if size is not None:
            self._sizes[key] = size
        return size

    def list(self, prefix: str) -> Iterator[str]:
        """As the objects'."""
        return self._objects.list(prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        """As the objects'."""
        return self._objects.sizes(prefix)

    def is_empty(self) -> bool:
        """As the objects'."""
        return self._objects.is_empty()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read up to `length` bytes from byte `start`, through the pages."""
        return next(self.read_ranges(key, [(start, length)]))

    def read_sized(self, key: str, start: int, length: int, *, believed_bytes: int) -> tuple[bytes, int]:
        """Read as `read_range`, and tell the object's size; where all pages are kept of one of that size, nobody asks.

        Pages are fetched together with the size of what they are part of, so that those kept under a size are of an
        object of that size, whoever believed it.
        """
        believed = self._sizes.setdefault(key, believed_bytes)
        data = self.read_range(key, start, length)
        size = self._sizes.get(key, believed)
        if size != believed:  # where it stands it is another: what was read may have been beyond its end
            data = self.read_range(key, start, length)
        return data, size

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield ranges of one object, (start, length) in bytes, through the pages.

        Where they ascend each page is read once, and neighbouring pages that are missing are fetched together, up to
        16 MiB in one request.

        Raises
        ------
        FileNotFoundError
            No object stands under `key`; or none does any more, and not all of its pages that are needed are kept.
        """
        size = self._known_size(key)
        found = [(start, max(0, min(length, size - start))) for start, length in ranges]
        wanted = {number for start, length in found for number in _page_numbers(start, length)}
        at_hand: dict[int, bytes] = {}
        for start, length in found:
            parts: list[bytes] = []
            for number in _page_numbers(start, length):
                if number not in at_hand:
                    at_hand = self._pages(key, size, number, wanted)
                before = number * PAGE_BYTES
                parts.append(at_hand[number][max(0, start - before) : start + length - before])
            yield b"".join(parts)

    def forget(self, key: str) -> int:
        """Drop all that is kept of an object, for who finds it damaged: it is fetched anew when it is next read.

        Returns
        -------
        int
            Pages dropped.
        """
        num_dropped = 0
        sizes = {self._sizes.pop(key, None), self._objects.size(key)}
        for size in [size for size in sizes if size is not None]:
            for number in _page_numbers(0, size):
                num_dropped += self._drop(self._path(key, size, number))
        return num_dropped

    def _read_record(self, key: str, parent: str, index: int, max_bytes: int | None) -> bytes:
        """Give a record that is kept, where it can be vouched for; or read it where it is, and keep it."""
        vouched, path = self._vouched[parent], self._path(key, 0, 0)
        listed = self._list_of(parent)
        kept = None if listed is None else self._kept(path)
        if kept is not None and listed is not None and vouched.is_vouched(kept, index, listed):
            return kept
        data = self._objects.read(key, max_bytes=max_bytes)
        self._keep(path, data)
        with self._lock:
            digests = self._digests.setdefault(parent, {})
            digest = hashlib.sha256(data).hexdigest()
            is_new = digests.get(index) != digest
            digests[index] = digest
            found = vouched.listed(digests) if is_new and len(digests) == vouched.num_records else None
        if found is not None:
            self._keep(self._path(f"{parent}/", 0, 0), found)
        return data

    def _list_of(self, parent: str) -> bytes | None:
        """Give the list of the digests of a folder's records, if one is kept that is vouched for."""
        if parent not in self._lists:
            kept = self._kept(self._path(f"{parent}/", 0, 0))
            if kept is None or not self._vouched[parent].is_list(kept):
                return None
            self._lists[parent] = kept
        return self._lists[parent]

    def _known_size(self, key: str) -> int:
        size = self._sizes.get(key)
        if size is None:
            size = self.size(key)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
        return size

    def _pages(self, key: str, size: int, number: int, wanted: set[int]) -> dict[int, bytes]:
        """Give a page that is kept; or fetch it, and with it those behind it that are wanted too and are not kept."""
        page = self._kept(self._path(key, size, number))
        if page is not None:
            return {number: page}
        last = number
        while last + 1 in wanted and last + 1 - number < _REQUEST_PAGES:
            if os.access(self._path(key, size, last + 1), os.R_OK):
                break
            last += 1
        return self._fetched(key, size, number, last)

    def _fetched(self, key: str, size: int, first: int, last: int) -> dict[int, bytes]:
        """Fetch neighbouring pages in one request, and keep them."""
        start, stop = first * PAGE_BYTES, min((last + 1) * PAGE_BYTES, size)
        data, standing = self._objects.read_sized(key, start, stop - start, believed_bytes=size)
        pages = {
            first + place: data[place * PAGE_BYTES : (place + 1) * PAGE_BYTES] for place in range(last - first + 1)
        }
        if standing != size:  # the object is not what it was when its size was asked, or what it was believed to be
            self._sizes[key] = standing
            return pages
        for number, page in pages.items():
            self._keep(self._path(key, size, number), page)
        return pages

    def _path(self, key: str, size: int, number: int) -> Path:
        name = hashlib.blake2b(f"{self._identity}\n{key}\n{size}\n{number}".encode(), digest_size=20).hexdigest()
        return self._folder / name[:2] / f"{name}.page"

    def _kept(self, path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if not is_sound(data):
            self._drop(path)
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read serves too
            os.utime(path)
        return data[:-CHECKSUM_BYTES]

    def _keep(self, path: Path, page: bytes) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(with_checksum(page))
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._warn(error)
            return
        self._account(len(page) + CHECKSUM_BYTES)

    def _drop(self, path: Path) -> bool:
        """Drop a file; False where another process did, or where it may not be."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        """Say once that the folder does not serve: what was asked for is at hand without it."""
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:
            warnings.warn(
                f"the local cache {self._folder} could not be written to ({error}). What cannot be kept there is read "
                "where it lies, each time it is needed. Free some room, or give another folder",
                RuntimeWarning,
                stacklevel=2,
            )

    def _account(self, added_bytes: int) -> None:
        """Count what was added, and from time to time the folder; one thread does, and none waits for it."""
        with self._lock:
            self._added_bytes += added_bytes
            if self._counting_pid == os.getpid() or not self._must_count():
                return
            self._counting_pid = os.getpid()  # a forked process finds its parent's, and counts for itself
            self._added_bytes = 0
        num_bytes = 0
        try:
            num_bytes = self._dropped()
        except OSError as error:
            self._warn(error)
        finally:
            with self._lock:
                self._num_bytes = num_bytes
                self._counting_pid = None

    def _must_count(self) -> bool:
        if self._num_bytes is None or self._added_bytes >= self._max_bytes // _COUNTS:
            return True
        return self._num_bytes + self._added_bytes > self._max_bytes

    def _dropped(self) -> int:
        """Count the pages as they lie, and drop the oldest where they take too much; gives the bytes that stay."""
        self._drop_stale_partials()
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*/*.page"):
            with contextlib.suppress(FileNotFoundError):  # another process dropped it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._max_bytes:
            return total
        for _, size, path in sorted(found):
            self._drop(path)
            total -= size
            if total <= self._max_bytes * _KEPT_AFTER_DROPPING:
                break
        return total

    def _drop_stale_partials(self) -> None:
        """Drop what processes left behind that were stopped while they wrote; a write takes seconds."""
        for path in self._folder.glob("*/*.page.*.partial"):
            with contextlib.suppress(FileNotFoundError):  # its writer has finished
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    self._drop(path)


def _page_numbers(start: int, length: int) -> range:
    return range(start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)) if length else range(0)


def _again(
    objects: Objects, folder: Path, identity: str, max_bytes: int, vouched: Mapping[str, VouchedRecords]
) -> KeptPages:
    return KeptPages(objects, folder, identity=identity, max_bytes=max_bytes, vouched=vouched)
