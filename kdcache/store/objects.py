"""Objects: named byte strings that appear whole or not at all.

An *object* is stored bytes under a *key*, a relative POSIX path below the store's address. Publishing is
create-only: the first writer wins, every later one is told so. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

__all__ = ["Objects", "open_objects"]

import os
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.store.bucket_address import SCHEMES
from kdcache.store.local_objects import LocalObjects


@runtime_checkable
class Objects(Protocol):
    """Where a cache's objects are kept."""

    @property
    def address(self) -> str:
        """The address as a user would type it."""

    @property
    def request_bytes(self) -> int:
        """Bytes that take about as long as a request takes by itself; 0 where there are no requests to spare.

        Where it is above 0, requests that do not depend on each other are best made at once, and ranges of an object
        that lie no further apart are read as one.
        """

    def publish(self, key: str, data: bytes) -> bool:
        """Store an object unless one stands under `key`; durable on return.

        Returns
        -------
        bool
            True when these bytes were stored, False when something stood there, which is then untouched.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Store an object in place of whatever stands under `key`, atomically; durable on return."""

    def delete(self, key: str) -> bool:
        """Remove an object; False when none stood there."""

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object.

        Raises
        ------
        FileNotFoundError
            No object stands under `key`.
        TooLargeError
            It has more than `max_bytes` bytes, where these are given; none is read.
        """

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read up to `length` bytes from byte `start`; fewer where the object ends before.

        Raises
        ------
        FileNotFoundError
            No object stands under `key`.
        """

    def read_sized(self, key: str, start: int, length: int, *, believed_bytes: int) -> tuple[bytes, int]:
        """Read as `read_range`, and tell the size of the whole object as it stands.

        Where the range lies within the object, and that is as large as it is believed to be, that is one request.

        Raises
        ------
        FileNotFoundError
            No object stands under `key`.
        """

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes | npt.NDArray[np.uint8]]:
        """Yield ranges of one object, (start, length) in bytes, each as `read_range` would; in as few requests as pay.

        What is yielded is good until this thread asks for the next, here or elsewhere.

        Raises
        ------
        FileNotFoundError
            No object stands under `key`.
        """

    def size(self, key: str) -> int | None:
        """Give an object's size in bytes, or None when none stands under `key`."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys below the folder `prefix` ("" for all), sorted by path component."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Give the size in bytes of each object below the folder `prefix` ("" for all), in the requests of `list`."""

    def is_empty(self) -> bool:
        """Tell whether nothing stands at the address; asks no further than to the first object."""

    def forget(self, key: str) -> int:
        """Drop what is kept of an object nearer than where it stands; gives how many parts, 0 where none are kept."""


def open_objects(address: str | os.PathLike[str]) -> Objects:
    """Open the store at an address; nothing is read or written yet.

    Parameters
    ----------
    address : str or path
        A local folder, given as a path or as a ``file://`` address, which need not exist yet; or a bucket of an object
        store and a prefix in it, ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX`` or ``az://CONTAINER/PREFIX``, with
        credentials from the environment.

    Raises
    ------
    StoreError
        The address names a kind of store that this release does not know, or no bucket, or holds credentials; or a
        file:// address that of another machine.
    """
    text = os.fspath(address)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalObjects(text)
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if not slash or host not in {"", "localhost"}:
            raise StoreError(
                f"{text}: a file:// address is of this machine, and its path starts at the root; nothing was read or "
                "written. Give file:///PATH, or a path"
            )
        return LocalObjects(f"/{path}")
    if scheme in SCHEMES:
        from kdcache.store.bucket_objects import BucketObjects  # noqa: PLC0415 - folders do without

        return BucketObjects(text)
    known = ", ".join(f"{name}:// ({meaning})" for name, meaning in SCHEMES.items())
    raise StoreError(
        f"this release knows no {scheme}:// addresses; nothing was read or written. Give a path, or {known}"
    )
