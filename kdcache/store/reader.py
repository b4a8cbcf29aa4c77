"""Reading rows out of shards: any rows in any order, whole shards, or everything.

A `ShardedReader` reads any sharded array of a cache. It keeps every shard's index and the chunks last decoded, in
bounded memory, and may be used by several threads at once. Where requests take their time, as to an object store, those
for several shards are made at once, and small shards are read whole.
"""

from __future__ import annotations

__all__ = [
    "DECODING_THREADS",
    "DEFAULT_CACHE_BYTES",
    "Expected",
    "ShardedReader",
    "by_chunk",
    "check_rows",
    "distinct",
]

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.errors import CorruptCacheError, ShapeError
from kdcache.store.at_once import at_once
from kdcache.store.checksums import CHECKSUM_BYTES
from kdcache.store.objects import Objects
from kdcache.store.place import Place
from kdcache.store.recent import Recent
from kdcache.store.runs import Run
from kdcache.store.shards import ShardSpec, decode_chunk, decode_shard, parse_index, shorter_than_index

DEFAULT_CACHE_BYTES = 64 * 2**20
"""Decoded chunks kept by a reader: a few hundred batches' worth of chunks, little beside any network."""
DECODING_THREADS = 2
"""Threads that decode ahead. Decompressing leaves the interpreter to others, so that training goes on beside them."""
_MISSING = "the shard is missing"
_AHEAD_BYTES = 2**26
"""What chunks that were fetched before their turn may take, decoded."""
_OVERHEAD_BYTES = 64
"""What a stored chunk that does not compress has above its decoded size, at most."""


class _Stored(NamedTuple):
    """A chunk's number in its shard, its bytes as stored, and the checksum that it is to have, if that is known."""

    chunk_in_shard: int
    data: bytes | npt.NDArray[np.uint8]
    expected: bytes | None


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
    expected_of : callable (shard number) -> Expected, optional
        Gives what is known of the shard from elsewhere.
    """

    def __init__(
        self,
        objects: Objects,
        place_of: Callable[[int], Place],
        spec: ShardSpec,
        num_shards: int,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        expected_of: Callable[[int], Expected] | None = None,
    ) -> None:
        self.spec = spec
        self.num_rows = num_shards * spec.shard_rows
        self._objects = objects
        self._place_of = place_of
        self._expected_of = expected_of
        self._indexes: Recent[int, _Index] = Recent(max(cache_bytes, spec.index_bytes))
        self._chunks: Recent[int, npt.NDArray[Any]] = Recent(cache_bytes)

    @property
    def is_far(self) -> bool:
        """Whether requests take their time, so that they are best made at once and each for much."""
        return self._objects.request_bytes > 0

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
        for shard_index, place, stored_chunks in self._shards(_by_shard(missing, self.spec.num_chunks)):
            for stored in stored_chunks:
                chunk = self._decode(stored, shard_index, place)
                chunk.flags.writeable = False
                chunk_index = shard_index * self.spec.num_chunks + stored.chunk_in_shard
                self._chunks.put(chunk_index, chunk, chunk.nbytes)
                yield chunk_index, chunk

    def read_chunks(self, chunk_indexes: Sequence[int], out: npt.NDArray[Any], *, first_row: int = 0) -> None:
        """Decode chunks straight into an array, past the memory of chunks.

        Parameters
        ----------
        chunk_indexes : sequence of int
            Chunk numbers over the whole array, ascending and without duplicates.
        out : ndarray [row, column]
            C-contiguous, of the stored dtype; each chunk goes to the places of its rows.
        first_row : int
            The row that stands first in `out`.

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered.
        """
        chunk_rows = self.spec.chunk_rows
        for shard_index, place, stored_chunks in self._shards(_by_shard(chunk_indexes, self.spec.num_chunks)):
            for stored in stored_chunks:
                start = (shard_index * self.spec.num_chunks + stored.chunk_in_shard) * chunk_rows - first_row
                self._decode(stored, shard_index, place, out=out[start : start + chunk_rows])

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
        run = Run.over(rows, self.spec)
        whole_rows = out.view(f"V{self.spec.row_bytes}")[:, 0]  # rows as single values move twice as quickly
        at_hand, done = 0, 0
        for shard_index, place, stored_chunks in self._shards(_by_shard(run.chunks, self.spec.num_chunks)):
            for stored in stored_chunks:
                self._decode(stored, shard_index, place, out=run.decoded_chunk(at_hand))
                at_hand += 1
                if at_hand == run.num_chunks or done + at_hand == len(run.chunks):
                    part, decoded = run.rows_of(done, at_hand)
                    check(decoded, rows[part])
                    whole_rows[places[part]] = decoded.view(whole_rows.dtype)[:, 0]
                    at_hand, done = 0, done + at_hand

    def read_shard(self, shard_index: int, *, num_rows: int | None = None) -> npt.NDArray[Any]:
        """Read a whole shard, or its first `num_rows` rows, in one go and past the memory of chunks."""
        place = self._place_of(shard_index)
        expected = self._expected(shard_index).checksums
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
        sizes = self._objects.sizes(self._place_of(0).key.rsplit("/", 2)[0])
        for shard_index in range(self.num_rows // self.spec.shard_rows):
            place = self._place_of(shard_index)
            if place.key not in sizes:
                raise place.corrupt(_MISSING)
            if sizes[place.key] < self.spec.index_bytes:
                raise shorter_than_index(sizes[place.key], self.spec, place=place)

    def prepare(self) -> None:
        """Read the indexes of all shards, where requests take their time: each shard is then one request away."""
        if self.is_far:
            shards = range(self.num_rows // self.spec.shard_rows)
            for _ in at_once(shards, lambda shard: self._opened(shard, self._place_of(shard), index_alone=True)):
                pass

    def _shards(self, wanted: Sequence[tuple[int, list[int]]]) -> Iterator[tuple[int, Place, Iterable[_Stored]]]:
        """Give some shards' chunks as they are stored: shard, place, and the chunks by their numbers in it.

        Far away, the next shards are fetched meanwhile. One by itself larger than what may wait is read in parts.
        """
        if not self.is_far:
            for shard_index, within in wanted:
                place = self._place_of(shard_index)
                yield shard_index, place, self._stored_chunks(place, within, self._opened(shard_index, place))
            return
        spans = {shard_index: self._spanned_bytes(within) for shard_index, within in wanted}
        fetched = at_once(wanted, self._fetched, bytes_of=lambda item: spans[item[0]], max_bytes=_AHEAD_BYTES)
        with contextlib.closing(fetched):
            for (shard_index, within), stored in zip(wanted, fetched, strict=True):
                place = self._place_of(shard_index)
                yield shard_index, place, stored or self._stored_chunks(place, within, self._opened(shard_index, place))

    def _spanned_bytes(self, within: Sequence[int]) -> int:
        """Bound what is read for some chunks of a shard, by their ascending numbers, with what lies between them."""
        gaps = (np.diff(within) - 1) * self.spec.chunk_bytes
        return len(within) * self.spec.chunk_bytes + int(np.minimum(gaps, self._objects.request_bytes).sum())

    def _fetched(self, wanted: tuple[int, list[int]]) -> list[_Stored] | None:
        """Fetch chunks of a shard; None, with its index at hand, where they are more than may wait for their turn."""
        shard_index, within = wanted
        place = self._place_of(shard_index)
        opened = self._opened(shard_index, place)
        num_bytes = int(opened[0].ranges[within, 1].sum())
        is_sound = num_bytes <= len(within) * (self.spec.chunk_bytes + _OVERHEAD_BYTES)
        if not is_sound or self._spanned_bytes(within) > _AHEAD_BYTES:
            return None
        return list(self._stored_chunks(place, within, opened))

    def _decode(
        self, stored: _Stored, shard_index: int, place: Place, *, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Check and decode a chunk; one that was kept nearer and is damaged is read again from where it stands."""
        try:
            return decode_chunk(stored.data, self.spec, place=place, out=out, expected=stored.expected)
        except CorruptCacheError:
            if not self._objects.forget(place.key):
                raise
        index, _ = self._opened(shard_index, place)
        start, length = index.ranges[stored.chunk_in_shard].tolist()
        data = self._read_range(place, start, length)
        return decode_chunk(data, self.spec, place=place, out=out, expected=index.expected_of(stored.chunk_in_shard))

    def _stored_chunks(
        self, place: Place, within: Sequence[int], opened: tuple[_Index, bytes | None]
    ) -> Iterator[_Stored]:
        """Yield some of a shard's chunks as they are stored, by their ascending numbers in it."""
        index, whole = opened
        ranges = index.ranges[list(within)].tolist()
        if whole is not None:
            for chunk_in_shard, (start, length) in zip(within, ranges, strict=True):
                yield _Stored(chunk_in_shard, whole[start : start + length], index.expected_of(chunk_in_shard))
            return
        try:
            found = self._objects.read_ranges(place.key, ranges)
            for chunk_in_shard, (start, length), data in zip(within, ranges, found, strict=True):
                if len(data) != length:
                    raise place.corrupt(f"only {len(data)} of {length} bytes from byte {start} could be read")
                yield _Stored(chunk_in_shard, data, index.expected_of(chunk_in_shard))
        except FileNotFoundError as error:  # deleted since its index was read
            raise place.corrupt(_MISSING) from error

    def _opened(self, shard_index: int, place: Place, *, index_alone: bool = False) -> tuple[_Index, bytes | None]:
        """Give a shard's index; with the whole shard, where that came with it in the same request."""
        index = self._indexes.get(shard_index)
        if index is not None:
            return index, None
        expected = self._expected(shard_index)
        try:
            ranges, whole = self._read_index(place, expected, index_alone=index_alone)
        except CorruptCacheError:
            if not self._objects.forget(place.key):
                raise
            ranges, whole = self._read_index(place, expected, index_alone=index_alone)
        index = _Index(ranges, expected.checksums)
        self._indexes.put(shard_index, index, index.num_bytes)
        return index, whole

    def _expected(self, shard_index: int) -> Expected:
        return Expected() if self._expected_of is None else self._expected_of(shard_index)

    def _read_index(
        self, place: Place, expected: Expected, *, index_alone: bool
    ) -> tuple[npt.NDArray[np.int64], bytes | None]:
        known = self._objects.size(place.key) if expected.num_bytes is None else expected.num_bytes
        if known is None:
            raise place.corrupt(_MISSING)
        is_whole = known <= self._objects.request_bytes and not index_alone
        length = known if is_whole else min(known, self.spec.index_bytes)
        try:
            tail, standing = self._objects.read_sized(place.key, known - length, length, believed_bytes=known)
        except FileNotFoundError as error:
            raise place.corrupt(_MISSING) from error
        if expected.num_bytes is not None and standing != known:
            raise place.corrupt(f"the shard has {standing} bytes, and its record names {known}: it is torn or another")
        index = tail[-self.spec.index_bytes :]
        ranges = parse_index(index, self.spec, shard_bytes=standing, place=place)
        return ranges, tail if is_whole else None

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
class Expected:
    """What is known of a shard from elsewhere, such as its record.

    Parameters
    ----------
    num_bytes : int, optional
        Its size.
    checksums : bytes, optional
        Those that its chunks are to have, one behind the other.
    """

    num_bytes: int | None = None
    checksums: bytes | None = None


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


def check_rows(rows: npt.NDArray[np.int64], num_rows: int) -> None:
    """Refuse row numbers outside an array with a ShapeError."""
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(f"row numbers are one axis of integers, not {rows.dtype} of shape {rows.shape}")
    outside = (rows < 0) | (rows >= num_rows)
    if outside.any():
        raise ShapeError(f"row {int(rows[outside][0])} is outside the array's rows 0 to {num_rows - 1}")


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


def _by_shard(chunk_indexes: Sequence[int], num_chunks: int) -> list[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for chunk_index in chunk_indexes:
        groups.setdefault(chunk_index // num_chunks, []).append(chunk_index % num_chunks)
    return list(groups.items())
