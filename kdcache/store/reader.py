"""Reading rows out of shards: any rows in any order, whole shards, or everything.

A `ShardedReader` reads any sharded array of a cache; a `CodesReader` reads a teacher's codes and refuses holes. Both
keep every shard's index and the chunks last decoded, in bounded memory, and may be used by several threads at once.
"""

from __future__ import annotations

__all__ = ["DECODING_THREADS", "DEFAULT_CACHE_BYTES", "CodesReader", "ShardedReader", "distinct"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument
from kdcache.errors import CorruptCacheError, ShapeError
from kdcache.store.checksums import CHECKSUM_BYTES
from kdcache.store.objects import Objects
from kdcache.store.place import Place
from kdcache.store.recent import Recent
from kdcache.store.room import room
from kdcache.store.shards import ShardSpec, decode_chunk, decode_shard, parse_index, shorter_than_index

DEFAULT_CACHE_BYTES = 64 * 2**20
"""Decoded chunks kept by a reader: a few hundred batches' worth of chunks, little beside any network."""
DECODING_THREADS = 2
"""Threads that decode ahead. Decompressing leaves the interpreter to others, so that training goes on beside them."""
_MISSING = "the shard is missing"


class ShardedReader:
    """Rows of one sharded array.

    Parameters
    ----------
    objects : Objects
        Where the shards are kept.
    place_of : callable
        Gives a shard's place by its number.
    spec : ShardSpec
        Shape and coding of the shards.
    num_shards : int
        Shards of the array.
    cache_bytes : int
        Decoded chunks to keep, in bytes; as much again at most is kept of the shards' indexes.
    expected_of : callable (shard number) -> bytes or None, optional
        Gives the checksums that the shard's chunks are to have, one behind the other, or None where nobody knows.
    """

    def __init__(
        self,
        objects: Objects,
        place_of: Callable[[int], Place],
        spec: ShardSpec,
        num_shards: int,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        expected_of: Callable[[int], bytes | None] | None = None,
    ) -> None:
        self.spec = spec
        self.num_rows = num_shards * spec.shard_rows
        self._objects = objects
        self._place_of = place_of
        self._expected_of = expected_of
        self._indexes: Recent[int, _Index] = Recent(max(cache_bytes, spec.index_bytes))
        self._chunks: Recent[int, npt.NDArray[Any]] = Recent(cache_bytes)
        self._every_row = np.arange(spec.chunk_rows)

    def read_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Read rows by number, in the order given; each chunk is read once however many of its rows are asked for.

        Parameters
        ----------
        rows : ndarray [row] of int64
            Row numbers; duplicates allowed.

        Returns
        -------
        ndarray [row, column]
            The rows in the stored dtype.

        Raises
        ------
        ShapeError
            A row number lies outside the array.
        CorruptCacheError
            A shard is missing, torn or altered.
        """
        check_rows(rows, self.num_rows)
        out = np.empty((len(rows), self.spec.num_columns), dtype=self.spec.little)
        positions = by_chunk(rows // self.spec.chunk_rows)
        within = rows % self.spec.chunk_rows
        for chunk_index, chunk in self.chunks(list(positions)):
            wanted = positions[chunk_index]
            out[wanted] = chunk[within[wanted]]
        return out

    def chunks(self, chunk_indexes: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield chunks by number, read in as few ranges as their places allow.

        Parameters
        ----------
        chunk_indexes : sequence of int
            Chunk numbers over the whole array, ascending and without duplicates.
        """
        missing: list[int] = []
        for chunk_index in chunk_indexes:
            chunk = self._chunks.get(chunk_index)
            if chunk is None:
                missing.append(chunk_index)
            else:
                yield chunk_index, chunk
        for shard_index, within in _by_shard(missing, self.spec.num_chunks):
            yield from self._read_chunks(shard_index, within)

    def read_block(self, first_row: int, out: npt.NDArray[Any]) -> None:
        """Decode consecutive rows straight into an array, past the memory of chunks.

        Parameters
        ----------
        first_row : int
            The first row of a chunk.
        out : ndarray [row, column]
            C-contiguous, of the stored dtype; whole chunks of one shard.

        Raises
        ------
        CorruptCacheError
            The shard is missing, torn or altered.
        """
        chunk_rows = self.spec.chunk_rows
        shard_index, within = divmod(first_row // chunk_rows, self.spec.num_chunks)
        chunks = range(within, within + len(out) // chunk_rows)
        place = self._place_of(shard_index)
        for chunk_in_shard, stored in self._stored_chunks(shard_index, place, chunks):
            start = (chunk_in_shard - within) * chunk_rows
            self._decode(chunk_in_shard, stored, shard_index, place, out=out[start : start + chunk_rows])

    def scatter(
        self,
        rows: npt.NDArray[np.int64],
        out: npt.NDArray[Any],
        places: npt.NDArray[np.int64],
        *,
        check: Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], None],
    ) -> None:
        """Decode rows and put each at a place of its own, while its chunk is at hand, past the memory of chunks.

        Parameters
        ----------
        rows : ndarray [row] of int64
            Row numbers, ascending; duplicates allowed.
        out : ndarray [place, column]
            Of the stored dtype.
        places : ndarray [row] of int64
            Where each row goes.
        check : callable (ndarray [row, column], ndarray [row]) -> None
            Is given the rows of every chunk, and their numbers, before they are put anywhere.

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered.
        """
        decoded = room("decoded", self.spec.chunk_bytes).view(self.spec.little)
        decoded = decoded.reshape(self.spec.chunk_rows, self.spec.num_columns)
        whole_rows = out.view(f"V{self.spec.row_bytes}")[:, 0]  # rows as single values move twice as quickly
        positions = by_chunk(rows // self.spec.chunk_rows)
        for shard_index, within in _by_shard(list(positions), self.spec.num_chunks):
            place = self._place_of(shard_index)
            for chunk_in_shard, stored in self._stored_chunks(shard_index, place, within):
                wanted = positions[shard_index * self.spec.num_chunks + chunk_in_shard]
                chunk = self._decode(chunk_in_shard, stored, shard_index, place, out=decoded)
                within_chunk = rows[wanted] % self.spec.chunk_rows
                if not np.array_equal(within_chunk, self._every_row):  # rows may be missing, or stand twice
                    chunk = chunk[within_chunk]
                check(chunk, rows[wanted])
                whole_rows[places[wanted]] = chunk.view(whole_rows.dtype)[:, 0]

    def read_shard(self, shard_index: int, *, num_rows: int | None = None) -> npt.NDArray[Any]:
        """Read a whole shard, or its first `num_rows` rows, in one go and past the memory of chunks."""
        place = self._place_of(shard_index)
        expected = self._expected(shard_index)
        try:
            return decode_shard(self._read_object(place), self.spec, place=place, num_rows=num_rows, expected=expected)
        except CorruptCacheError:
            if not self._objects.forget(place.key):
                raise
        return decode_shard(self._read_object(place), self.spec, place=place, num_rows=num_rows, expected=expected)

    def check_shards(self) -> None:
        """Check that every shard is there with the bytes of an index at least; none is opened.

        Raises
        ------
        CorruptCacheError
            A shard is missing or too short.
        """
        for shard_index in range(self.num_rows // self.spec.shard_rows):
            place = self._place_of(shard_index)
            shard_bytes = self._shard_bytes(place)
            if shard_bytes < self.spec.index_bytes:
                raise shorter_than_index(shard_bytes, self.spec, place=place)

    def _read_chunks(self, shard_index: int, within: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        place = self._place_of(shard_index)
        for chunk_in_shard, stored in self._stored_chunks(shard_index, place, within):
            chunk = self._decode(chunk_in_shard, stored, shard_index, place)
            chunk.flags.writeable = False
            chunk_index = shard_index * self.spec.num_chunks + chunk_in_shard
            self._chunks.put(chunk_index, chunk, chunk.nbytes)
            yield chunk_index, chunk

    def _decode(
        self,
        chunk_in_shard: int,
        stored: bytes | npt.NDArray[np.uint8],
        shard_index: int,
        place: Place,
        *,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Check and decode a chunk; one that was kept nearer and is damaged is read again from where it stands."""
        index = self._index(shard_index, place)
        expected = index.expected_of(chunk_in_shard)
        try:
            return decode_chunk(stored, self.spec, place=place, out=out, expected=expected)
        except CorruptCacheError:
            if not self._objects.forget(place.key):
                raise
        start, length = index.ranges[chunk_in_shard].tolist()
        stored = self._read_range(place, start, length)
        return decode_chunk(stored, self.spec, place=place, out=out, expected=expected)

    def _stored_chunks(
        self, shard_index: int, place: Place, within: Sequence[int]
    ) -> Iterator[tuple[int, bytes | npt.NDArray[np.uint8]]]:
        """Yield some of a shard's chunks as they are stored, by their ascending numbers in it."""
        ranges = self._index(shard_index, place).ranges[list(within)].tolist()
        try:
            found = self._objects.read_ranges(place.key, ranges)
            for chunk_in_shard, (start, length), data in zip(within, ranges, found, strict=True):
                if len(data) != length:
                    raise place.corrupt(f"only {len(data)} of {length} bytes from byte {start} could be read")
                yield chunk_in_shard, data
        except FileNotFoundError as error:  # deleted since its index was read
            raise place.corrupt(_MISSING) from error

    def _index(self, shard_index: int, place: Place) -> _Index:
        index = self._indexes.get(shard_index)
        if index is not None:
            return index
        try:
            ranges = self._read_index(place)
        except CorruptCacheError:
            if not self._objects.forget(place.key):
                raise
            ranges = self._read_index(place)
        index = _Index(ranges, self._expected(shard_index))
        self._indexes.put(shard_index, index, index.num_bytes)
        return index

    def _expected(self, shard_index: int) -> bytes | None:
        return None if self._expected_of is None else self._expected_of(shard_index)

    def _read_index(self, place: Place) -> npt.NDArray[np.int64]:
        shard_bytes = self._shard_bytes(place)
        start = max(0, shard_bytes - self.spec.index_bytes)
        tail = self._read_range(place, start, shard_bytes - start)
        return parse_index(tail, self.spec, shard_bytes=shard_bytes, place=place)

    def _shard_bytes(self, place: Place) -> int:
        shard_bytes = self._objects.size(place.key)
        if shard_bytes is None:
            raise place.corrupt(_MISSING)
        return shard_bytes

    def _read_range(self, place: Place, start: int, length: int) -> bytes:
        try:
            return self._objects.read_range(place.key, start, length)
        except FileNotFoundError as error:  # deleted since its index was read
            raise place.corrupt(_MISSING) from error

    def _read_object(self, place: Place) -> bytes:
        try:
            return self._objects.read(place.key)
        except FileNotFoundError as error:
            raise place.corrupt(_MISSING) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Index:
    """Start and length of a shard's chunks, int64 [chunk, 2], and the checksums that they are to have, if known."""

    ranges: npt.NDArray[np.int64]
    expected: bytes | None

    @property
    def num_bytes(self) -> int:
        return self.ranges.nbytes + len(self.expected or b"")

    def expected_of(self, chunk_in_shard: int) -> bytes | None:
        if self.expected is None:
            return None
        return self.expected[chunk_in_shard * CHECKSUM_BYTES : (chunk_in_shard + 1) * CHECKSUM_BYTES]


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

    def read_block(self, first_row: int, out: npt.NDArray[Any]) -> None:
        """Decode consecutive rows straight into an array; padding holds the fill code.

        Parameters
        ----------
        first_row : int
            Row number, views included: the first row of a chunk.
        out : ndarray [row, column]
            C-contiguous, of the stored dtype; whole chunks of one shard.

        Raises
        ------
        CorruptCacheError
            The shard is missing, torn or altered, or holds no data where a row should be.
        """
        self._reader.read_block(first_row, out)
        num_real = self._cache_document.num_rows - first_row % self._cache_document.padded_rows
        codes = out[: max(0, num_real)]
        self._refuse_holes(codes, np.arange(len(codes)) + first_row)

    def _refuse_holes(self, codes: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> None:
        if not has_fill(codes, self.spec.fill):
            return
        is_fill = np.isnan(codes) if codes.dtype.kind == "f" else codes == codes.dtype.type(self.spec.fill)
        row = int(rows[is_fill.any(axis=1)][0])
        raise self._place_of(row // self.spec.shard_rows).corrupt(
            f"row {row} holds the fill code: it was never written"
        )


def check_rows(rows: npt.NDArray[np.int64], num_rows: int) -> None:
    """Refuse row numbers outside an array with a ShapeError."""
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(f"row numbers are one axis of integers, not {rows.dtype} of shape {rows.shape}")
    outside = (rows < 0) | (rows >= num_rows)
    if outside.any():
        raise ShapeError(f"row {int(rows[outside][0])} is outside the array's rows 0 to {num_rows - 1}")


def has_fill(codes: npt.NDArray[Any], fill: float) -> bool:
    """Tell whether the fill code stands anywhere among stored codes; one pass."""
    if codes.size == 0:
        return False
    if codes.dtype.kind == "f":  # by bits, several times quicker than by numbers: NaN stands above infinity
        infinity = int(np.array(np.inf, codes.dtype).view(f"u{codes.itemsize}"))
        sign = 1 << (8 * codes.itemsize - 1)
        highest = int(codes.view(f"<i{codes.itemsize}").max())
        return highest > infinity or int(codes.view(f"<u{codes.itemsize}").max()) > sign + infinity
    return int(codes.max()) >= int(fill)  # the fill code is the largest integer of its type


def by_chunk(chunk_of: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
    """Give the positions at which each chunk number stands, by chunk number, ascending."""
    order = np.argsort(chunk_of, kind="stable")
    ascending = chunk_of[order]
    starts = np.flatnonzero(np.diff(ascending)) + 1
    chunks = ascending[np.concatenate([[0], starts])] if len(ascending) else ascending
    return dict(zip(chunks.tolist(), np.split(order, starts), strict=False))  # no numbers split into one empty array


def distinct(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Give the different numbers, ascending: `numpy.unique` without what it imports when it is first called."""
    ascending = np.sort(values)
    return ascending[np.concatenate([[True], np.diff(ascending) != 0])] if len(ascending) else ascending


def _by_shard(chunk_indexes: Sequence[int], num_chunks: int) -> Iterator[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for chunk_index in chunk_indexes:
        groups.setdefault(chunk_index // num_chunks, []).append(chunk_index % num_chunks)
    yield from groups.items()
