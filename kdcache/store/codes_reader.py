"""Reading a teacher's codes: rows that exist, and never a hole."""

from __future__ import annotations

__all__ = ["CodesReader", "has_fill"]

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument
from kdcache.errors import ShapeError
from kdcache.store.place import Place
from kdcache.store.reader import ShardedReader, check_rows
from kdcache.store.shards import ShardSpec


class CodesReader:
    """Rows of one teacher's codes; a row that reads as a hole is an error, never a number.

    Rows are numbered view by view: row `first_row` of view `view_index` is
    ``view_index * cache_document.padded_rows + first_row``.

    Parameters
    ----------
    reader : ShardedReader
        The array.
    cache_document : CacheDocument
        Says which rows exist.
    place_of : callable
        Gives a shard's place by its number.
    """

    def __init__(self, reader: ShardedReader, cache_document: CacheDocument, place_of: Callable[[int], Place]) -> None:
        self._reader = reader
        self._cache_document = cache_document
        self._place_of = place_of

    @property
    def spec(self) -> ShardSpec:
        """Shape and coding of the shards."""
        return self._reader.spec

    @property
    def is_far(self) -> bool:
        """Whether requests take their time, so that they are best made at once and each for much."""
        return self._reader.is_far

    def read_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Read rows by number, in the order given; duplicates allowed.

        Parameters
        ----------
        rows : ndarray [row] of int64
            Row numbers, views included.

        Returns
        -------
        ndarray [row, column]
            The codes in the stored dtype.

        Raises
        ------
        ShapeError
            A row number lies outside the array or in the padding behind a view's last row.
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        check_rows(rows, self._reader.num_rows)
        padding = rows % self._cache_document.padded_rows >= self._cache_document.num_rows
        if padding.any():
            raise ShapeError(
                f"row {int(rows[padding][0])} is padding: each view has {self._cache_document.num_rows} rows in a "
                f"block of {self._cache_document.padded_rows}; row numbers are view_index * padded_rows + first_row"
            )
        codes = self._reader.read_rows(rows)
        self._refuse_holes(codes, rows)
        return codes

    def read_shard(self, shard_index: int) -> npt.NDArray[Any]:
        """Read the rows of one shard, padding left out.

        Parameters
        ----------
        shard_index : int
            Shard, counted over all views.

        Returns
        -------
        ndarray [row, column]
            `cache_document.rows_in_shard(shard_index)` rows of codes.

        Raises
        ------
        ShapeError
            There is no such shard.
        CorruptCacheError
            The shard is missing, torn or altered, or holds no data where a row should be.
        """
        if not 0 <= shard_index < self._cache_document.num_shards:
            raise ShapeError(f"there is no shard {shard_index}; the cache has {self._cache_document.num_shards}")
        codes = self._reader.read_shard(shard_index, num_rows=self._cache_document.rows_in_shard(shard_index))
        self._refuse_holes(codes, np.arange(len(codes)) + shard_index * self.spec.shard_rows)
        return codes

    def check_shards(self) -> None:
        """Check that every shard is there with the bytes of an index at least; none is opened.

        Raises
        ------
        CorruptCacheError
            A shard is missing or too short.
        """
        self._reader.check_shards()

    def scatter(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any], places: npt.NDArray[np.int64]) -> None:
        """Decode rows and put each at a place of its own, past the memory of chunks.

        Parameters
        ----------
        rows : ndarray [row] of int64
            Row numbers, views included, ascending; duplicates allowed.
        out : ndarray [place, column]
            Of the stored dtype.
        places : ndarray [row] of int64
            Where each row goes.

        Raises
        ------
        ShapeError
            A row number lies outside the array.
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        check_rows(rows, self._reader.num_rows)
        self._reader.scatter(rows, out, places, check=self._refuse_holes)

    def read_chunks(self, chunk_indexes: Sequence[int], out: npt.NDArray[Any], *, first_row: int = 0) -> None:
        """Decode chunks straight into an array; padding holds the fill code.

        Parameters
        ----------
        chunk_indexes : sequence of int
            Chunk numbers, views included, ascending and without duplicates.
        out : ndarray [row, column]
            C-contiguous, of the stored dtype; each chunk goes to the places of its rows.
        first_row : int
            The row that stands first in `out`.

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        self._reader.read_chunks(chunk_indexes, out, first_row=first_row)
        chunk_rows = self.spec.chunk_rows
        for chunk_index in chunk_indexes:
            first = chunk_index * chunk_rows
            num_real = self._cache_document.num_rows - first % self._cache_document.padded_rows
            codes = out[first - first_row : first - first_row + min(chunk_rows, max(0, num_real))]
            self._refuse_holes(codes, np.arange(len(codes)) + first)

    def prepare(self) -> None:
        """Read what is needed to find any chunk, where requests take their time, for who will read all."""
        self._reader.prepare()

    def _refuse_holes(self, codes: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> None:
        if not has_fill(codes, self.spec.fill):
            return
        is_fill = np.isnan(codes) if codes.dtype.kind == "f" else codes == codes.dtype.type(self.spec.fill)
        row = int(rows[is_fill.any(axis=1)][0])
        raise self._place_of(row // self.spec.shard_rows).corrupt(
            f"row {row} holds the fill code: it was never written"
        )


def has_fill(codes: npt.NDArray[Any], fill: float) -> bool:
    """Tell whether the fill code stands anywhere among stored codes; one pass."""
    if codes.size == 0:
        return False
    if codes.dtype.kind == "f":  # by bits, several times quicker than by numbers: NaN stands above infinity
        infinity = int(np.array(np.inf, codes.dtype).view(f"u{codes.itemsize}"))
        sign = 1 << (8 * codes.itemsize - 1)
        highest = int(_highest(codes, f"<i{codes.itemsize}"))
        return highest > infinity or int(_highest(codes, f"<u{codes.itemsize}")) > sign + infinity
    return int(_highest(codes, codes.dtype)) >= int(fill)  # the fill code is the largest integer of its type


def _highest(codes: npt.NDArray[Any], dtype: str | np.dtype[Any]) -> Any:
    return np.maximum.reduce(codes.view(dtype), axis=None)
