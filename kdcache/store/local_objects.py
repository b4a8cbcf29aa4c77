"""Local objects: files of a folder, linked to their names when they are whole."""

from __future__ import annotations

__all__ = ["LocalObjects"]

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.store.keys import check_key
from kdcache.store.limits import TooLargeError
from kdcache.store.room import lent
from kdcache.store.writers import is_alive, this_machine

PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>[1-9][0-9]*)-[0-9a-f]{16}\.partial")
_STALE_SECONDS = 24 * 3600
"""A write takes seconds; what is a day old was left behind, on whatever machine."""
_RUN_BYTES = 2**18
"""Ranges behind one another that are read at once: what a core's own cache holds."""
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


class LocalObjects:
    """Objects as files of a local folder, or of a mounted one with POSIX semantics.

    An object is written to a hidden `*.partial` file beside its final name, synced, and then linked to that name, so
    that a reader sees all of it or nothing, and a crash leaves at most a stale partial file that nothing ever reads.
    A partial file's name tells which process of which machine wrote it: ``.NAME.MACHINE-PID-RANDOM.partial``.

    Parameters
    ----------
    root : str or path
        The folder; made by the first write.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = pathlib.Path(root)
        self._address = os.fspath(root)

    def __repr__(self) -> str:
        return f"LocalObjects({self._address!r})"

    request_bytes = 0

    @property
    def address(self) -> str:
        """The folder as it was given."""
        return self._address

    def publish(self, key: str, data: bytes) -> bool:
        """Store an object unless one stands under `key`; durable on return, True for the winner alone."""
        path = self._path(key)
        with _writing(path):
            if path.exists():
                _sync_standing(path)  # its writer may not have come as far as this
                return False
            with self._partial(path, data) as partial:
                created = _link(partial, path)
            _sync_standing(path)
            return created

    def replace(self, key: str, data: bytes) -> None:
        """Store an object in place of whatever stands under `key`, atomically; durable on return."""
        path = self._path(key)
        with _writing(path):
            with self._partial(path, data) as partial:
                partial.replace(path)
            _sync_standing(path)

    def delete(self, key: str) -> bool:
        """Remove an object; False when none stood there."""
        path = self._path(key)
        with _writing(path, "removed", "It may stand, and all"):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return False
            with _writing(path, "removed for good", "It is gone, and stands again if power fails now; all other"):
                _sync_folder(path.parent)
            return True

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object; FileNotFoundError when none stands under `key`, TooLargeError where it is larger."""
        path = self._path(key)
        with _reading(path), path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if max_bytes is not None and num_bytes > max_bytes:
                raise TooLargeError(num_bytes)
            return file.read()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read up to `length` bytes from byte `start`; FileNotFoundError when nothing stands under `key`."""
        return next(self.read_ranges(key, [(start, length)])).tobytes()

    def read_sized(self, key: str, start: int, length: int, *, believed_bytes: int) -> tuple[bytes, int]:  # noqa: ARG002
        """Read as `read_range`, and tell the file's size."""
        data = self.read_range(key, start, length)
        return data, self._path(key).stat().st_size

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield ranges of one file, (start, length) in bytes, each good until the next is asked for.

        FileNotFoundError when nothing stands under `key`.
        """
        check_key(key)
        path = f"{self._root}/{key}"  # no Path: this is called once a chunk
        with _reading(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # No more memory than the file can fill, whatever a damaged index asks for.
            file_bytes = os.fstat(descriptor).st_size
            runs = list(_runs(ranges, file_bytes))
            with lent("stored", max((sum(lengths) for _, lengths in runs), default=0)) as stored:
                for first, lengths in runs:
                    with _reading(path):
                        read = _read_fully(descriptor, first, stored[: sum(lengths)])
                    end = 0
                    for length in lengths:
                        yield read[end : end + length]
                        end += length
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int | None:
        """Give an object's size in bytes, or None when none stands under `key`."""
        path = self._path(key)
        try:
            with _reading(path):
                return path.stat().st_size
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys below the folder `prefix` ("" for all), sorted by path component; hidden files never."""
        folder = self._path(prefix) if prefix else self._root
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            key = f"{prefix}/{path.name}" if prefix else path.name
            if path.name.startswith("."):  # partial files, and what desktops and network file systems leave behind
                continue
            if path.is_dir():
                yield from self.list(key)
            else:
                yield key

    def sizes(self, prefix: str) -> dict[str, int]:
        """Give the size in bytes of each object below the folder `prefix` ("" for all)."""
        sizes = ((key, self.size(key)) for key in self.list(prefix))
        return {key: size for key, size in sizes if size is not None}  # None: taken away since

    def is_empty(self) -> bool:
        """Tell whether nothing stands in the folder, hidden files aside."""
        return next(self.list(""), None) is None

    def forget(self, key: str) -> int:  # noqa: ARG002 - files are read where they stand
        """Drop nothing: files are read where they stand."""
        return 0

    def remove_stale_partials(self) -> int:
        """Remove the partial files that writers which were stopped have left behind.

        A file is stale when its writer was a process of this machine that lives no more, or when it is older than a
        day. Nothing else is touched: no file of a writer at work, here or on another machine, and no other program's.

        Returns
        -------
        int
            Files removed.
        """
        stale = [path for path in self._root.rglob(f".*{PARTIAL}") if _is_stale(path)]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    def _path(self, key: str) -> pathlib.Path:
        check_key(key)
        return self._root / key

    @contextlib.contextmanager
    def _partial(self, path: pathlib.Path, data: bytes) -> Iterator[pathlib.Path]:
        """Write the bytes durably to a file of their own beside `path`, which is gone afterwards."""
        _make_folder(path.parent)
        partial = path.with_name(f".{path.name}.{this_machine()}-{os.getpid()}-{secrets.token_hex(8)}{PARTIAL}")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                _write_fully(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield partial
        finally:
            partial.unlink(missing_ok=True)


_REMEDIES = {
    errno.ENOSPC: "Free some room on the disk",
    errno.EDQUOT: "Free some of the quota",
    errno.EFBIG: "Raise the limit of the size of files (ulimit -f)",
    errno.EROFS: "Give an address that can be written to",
    errno.EACCES: "Have the folder's owner allow it, or give another address",
    errno.EPERM: "Have the folder's owner allow it, or give another address",
    errno.EEXIST: "A file stands where a folder should be: give another address",
    errno.ENOTDIR: "A file stands where a folder should be: give another address",
}


@contextlib.contextmanager
def _reading(path: pathlib.Path | str) -> Iterator[None]:
    """Have a file that is there and cannot be read named: that is no damage of the cache that could be mended."""
    try:
        yield
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        refused = StoreError(
            f"{path} cannot be read: {error.strerror or error}. Nothing was changed. See to its rights, its disk or "
            "its mount, and try again; a file that is lost for good can be removed, and `kdcache repair` makes it anew"
        )
        refused.errno = error.errno
        raise refused from error


@contextlib.contextmanager
def _writing(
    path: pathlib.Path, what: str = "written", left: str = "Nothing of it can be read in part, and all"
) -> Iterator[None]:
    """Have a change that the system refuses say what stands and what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        then = _REMEDIES.get(error.errno or 0, "See to the disk")
        refused = StoreError(
            f"{path} cannot be {what}: {error.strerror or error}. {left} that was published is "
            f"kept. {then}, and run the same command again: it goes on from there"
        )
        refused.errno = error.errno
        raise refused from error


def _is_stale(path: pathlib.Path) -> bool:
    name = _PARTIAL_NAME.fullmatch(path.name)
    if name is None:
        return False
    if name["machine"] == this_machine() and not is_alive(int(name["pid"])):
        return True
    try:
        return time.time() - path.lstat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:  # its writer has finished
        return False


def _runs(ranges: Sequence[tuple[int, int]], file_bytes: int) -> Iterator[tuple[int, list[int]]]:
    """Part ranges into those that are read at once, since one begins where the other ends: the start, and lengths."""
    first, end, lengths = 0, 0, list[int]()
    for start, wanted in ranges:
        length = max(0, min(wanted, file_bytes - start))
        if lengths and (start != end or end + length - first > _RUN_BYTES):
            yield first, lengths
            lengths = []
        if not lengths:
            first = start
        lengths.append(length)
        end = start + length
    if lengths:
        yield first, lengths


def _read_fully(descriptor: int, start: int, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Read into an array, and give what of it was filled."""
    num_bytes = 0
    while num_bytes < len(out):
        num_read = os.preadv(descriptor, [out[num_bytes:].data], start + num_bytes)
        if not num_read:
            break
        num_bytes += num_read
    return out[:num_bytes]


def _write_fully(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_standing(path: pathlib.Path) -> None:
    """Sync the folder of a file that has its name: where that fails, the file stands all the same."""
    with _writing(path, "made durable", "It stands whole, and is lost if power fails before it is on the disk; all"):
        _sync_folder(path.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: pathlib.Path) -> None:
    """Make a folder and its parents, each durably: a synced file in a lost folder is lost."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _link(partial: pathlib.Path, path: pathlib.Path) -> bool:
    try:
        os.link(partial, path)
    except FileExistsError:
        # A network file system may carry out a link, lose its answer, and fail the repeated request.
        return partial.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_without_replacing(partial, path)
    return True


def _rename_without_replacing(partial: pathlib.Path, path: pathlib.Path) -> bool:
    """Publish where there are no hard links, by Linux's renameat2 with RENAME_NOREPLACE.

    A plain rename would let the last writer win, silently and against the record of the first, so where the kernel or
    the file system cannot do this either, nothing is published and the error says so.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        result = rename(_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE)
        if result == 0:
            return True
        code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}:
        raise StoreError(
            f"{path}: this file system has neither hard links nor a rename that refuses to replace, so two builders "
            "could overwrite each other unseen. Nothing was published. Build the cache on another file system and "
            "copy it here when it is complete."
        )
    raise OSError(code, os.strerror(code), os.fspath(path))
