"""Local copies: a teacher's codes uncompressed in one file of a local folder, mapped into memory.

A copy is named after the digest of the stored data, so that it is never taken for another's, and appears whole or not
at all. Beside it stand the CRC-32C of its *blocks*, about 64 KiB each: a block is held against its own before the first
of its rows is given, once a process.

    FOLDER/DIGEST.codes     the rows, little-endian, one after the other, padding included
    FOLDER/DIGEST.crc32c    uint32 [block], then the CRC-32C of these
"""

from __future__ import annotations

__all__ = ["LocalCopy"]

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from kdcache.errors import CorruptCacheError, KdcacheError, StoreError
from kdcache.store.checksums import CHECKSUM_BYTES, is_sound, with_checksum
from kdcache.store.codes_reader import CodesReader
from kdcache.store.reader import distinct

_BLOCK_BYTES = 2**16


class LocalCopy:
    """An uncompressed copy of one teacher's codes, open for reading; made by `LocalCopy.of`.

    Attributes
    ----------
    codes : ndarray [row, column]
        All rows of all views, mapped. Rows are to be given to `check` before they are read.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._path = path
        self._block_rows = _block_rows(shape[1] * dtype.itemsize)
        # Mapped as if to be changed, since torch warns of memory that cannot be; changes would stay in this process.
        self.codes: npt.NDArray[Any] = np.memmap(path, dtype, mode="c", shape=shape)
        self._sums = _read_sums(path.with_suffix(".crc32c"), -(-shape[0] // self._block_rows), self._damaged)
        self._is_checked = np.zeros(len(self._sums), bool)

    @classmethod
    def of(cls, folder: Path, reader: CodesReader, *, data_digest: str, num_rows: int) -> LocalCopy:
        """Open a teacher's copy; make it where there is none.

        Of several processes that want it at a time one makes it, and the others wait. A copy that was not finished is
        made from its start.

        Parameters
        ----------
        folder : path
            Made where it does not stand.
        reader : CodesReader
            Where the rows come from.
        data_digest : str
            Digest of the stored data.
        num_rows : int
            Rows of all views, padding included.

        Raises
        ------
        CorruptCacheError
            A stored shard is missing, torn or altered, or the copy is.
        StoreError
            The folder cannot be written to, or is full; or the system is none of the POSIX kind.
        """
        path = folder / f"{data_digest[:32]}.codes"
        spec = reader.spec
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with _alone(path.with_suffix(".lock")):
                    if not path.exists():
                        _write(path, reader, num_rows)
        except KdcacheError:  # some are OSErrors too, and say already what failed
            raise
        except OSError as error:
            raise StoreError(
                f"the local copy {path} of {num_rows * spec.row_bytes} bytes could not be made ({error}); what there "
                "was of it is gone, and the cache is untouched. Name another folder as local_copy=, or another tier="
            ) from error
        copy_bytes = path.stat().st_size
        if copy_bytes != num_rows * spec.row_bytes:
            raise _damaged_copy(path, f"it has {copy_bytes} bytes where the rows take {num_rows * spec.row_bytes}")
        return cls(path, (num_rows, spec.num_columns), spec.little)

    def check(self, rows: npt.NDArray[np.int64]) -> None:
        """Hold the blocks of some rows, int64 [row], against their sums, those that were not before.

        Raises
        ------
        CorruptCacheError
            The copy was altered.
        """
        blocks = rows // self._block_rows
        unchecked = blocks[~self._is_checked[blocks]]
        for block in distinct(unchecked).tolist():
            if _sum_of(self.codes[block * self._block_rows : (block + 1) * self._block_rows]) != self._sums[block]:
                raise self._damaged(f"rows from {block * self._block_rows} on were altered")
            self._is_checked[block] = True

    def _damaged(self, reason: str) -> CorruptCacheError:
        return _damaged_copy(self._path, reason)


def _block_rows(row_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // row_bytes)


def _write(path: Path, reader: CodesReader, num_rows: int) -> None:
    """Write rows and sums beside their names, sums first to appear: who finds the rows finds the sums."""
    spec = reader.spec
    partial, sums_path = path.with_suffix(".partial"), path.with_suffix(".crc32c")
    block_rows = _block_rows(spec.row_bytes)
    sums: list[int] = []
    pending = np.empty((0, spec.num_columns), spec.little)
    try:
        reader.prepare()
        with partial.open("wb") as file:
            for first_row in range(0, num_rows, spec.shard_rows):
                rows = np.empty((spec.shard_rows, spec.num_columns), spec.little)
                first_chunk = first_row // spec.chunk_rows
                reader.read_chunks(range(first_chunk, first_chunk + spec.num_chunks), rows, first_row=first_row)
                file.write(rows.data)
                pending = np.concatenate([pending, rows])
                num_summed = len(pending) // block_rows * block_rows
                sums += [_sum_of(pending[start : start + block_rows]) for start in range(0, num_summed, block_rows)]
                pending = pending[num_summed:]
            _sync(file)
        if len(pending):
            sums.append(_sum_of(pending))
        with sums_path.open("wb") as file:
            file.write(with_checksum(np.array(sums, "<u4").tobytes()))
            _sync(file)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sum_of(rows: npt.NDArray[Any]) -> int:
    return int(google_crc32c.value(rows.tobytes()))


def _read_sums(path: Path, num_blocks: int, damaged: Any) -> npt.NDArray[np.uint32]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise damaged(f"{path.name} is missing") from error
    if len(data) != 4 * num_blocks + CHECKSUM_BYTES or not is_sound(data):
        raise damaged(f"{path.name} was altered")
    return np.frombuffer(data[:-CHECKSUM_BYTES], "<u4")


def _damaged_copy(path: Path, reason: str) -> CorruptCacheError:
    return CorruptCacheError(
        f"the local copy {path} is damaged: {reason}. The cache itself is untouched. Delete {path} and run again: "
        "it is made anew"
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time in; the system takes the lock from one that is killed."""
    try:
        import fcntl  # noqa: PLC0415 - not on every system, where only this is amiss
    except ImportError as error:
        raise StoreError(
            f"{path} cannot be locked: tier 'mapped' needs a POSIX system, such as Linux or macOS. Nothing was "
            "written, and the cache is untouched. Give another tier="
        ) from error
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
