"""The id index: from an example_id to its rows without reading examples.parquet.

An *entry* is (key, check, first_row, num_rows). An int64 id is its own key and has check 0; a string's key and check
are the two halves of its BLAKE2b-128. Entries stand sorted by (key, check) in chunks; the *fences* are the first
(key, check) of every chunk. A lookup finds the chunks by the fences and reads those alone, so that neither opening nor
memory grows with the number of examples. Beside its bounds each fence has the checksum with which its chunk ends as
stored, so that a chunk of another index, sound in itself, is refused.
"""

from __future__ import annotations

__all__ = ["IdIndex", "IndexArrays", "index_arrays", "index_spec"]

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import DuplicateExampleError, TransferSetError, UnknownExampleError
from kdcache.store.examples import ExampleTable
from kdcache.store.ids import ExampleIds, ids_as_given, outside_int64
from kdcache.store.place import Place
from kdcache.store.reader import ShardedReader, by_chunk
from kdcache.store.shards import ShardSpec

CHUNK_ENTRIES = 1024
"""Entries read and checked together: 32 KiB, and fences of 156 KiB for ten million examples. Chunks of 4,096 took twice
as long to look 256 scattered ids up in; chunks of 512 no less."""
SHARD_CHUNKS = 256
_CHUNKS_AT_ONCE = 256
"""Chunks that ids are looked up in together: 8 MiB of entries."""
_FIELDS = ("key", "check", "first_row", "num_rows")
_NAMED = 5
_HASHED_AT_ONCE = 65_536

Keys = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]


@dataclass(frozen=True, slots=True, eq=False)
class IndexArrays:
    """The index of one transfer set.

    Parameters
    ----------
    entries : ndarray [entry, field] of uint64
        (key, check, first_row, num_rows), ascending by (key, check).
    fences : ndarray [chunk, bound] of uint64
        (key, check) of the first entry of each chunk.
    """

    entries: npt.NDArray[np.uint64]
    fences: npt.NDArray[np.uint64]


def index_spec(num_examples: int) -> ShardSpec:
    """Give shape and coding of the entries' shards: it follows from the number of examples alone."""
    chunks = min(SHARD_CHUNKS, -(-num_examples // CHUNK_ENTRIES))
    return ShardSpec(chunks * CHUNK_ENTRIES, CHUNK_ENTRIES, len(_FIELDS), "uint64", 2**64 - 1)


def index_arrays(table: ExampleTable) -> IndexArrays:
    """Make the index of a table.

    Raises
    ------
    DuplicateExampleError
        An example_id stands more than once; the message names some, with their positions.
    """
    key, check = id_keys(table.example_ids)
    order = np.argsort(key, kind="stable") if table.example_id_type == "int64" else np.lexsort((check, key))
    entries = np.empty((len(table), len(_FIELDS)), dtype=np.uint64)
    columns: tuple[npt.NDArray[Any], ...] = (key, check, table.first_row, table.num_rows)
    for field, column in enumerate(columns):
        entries[:, field] = column[order]
    same = (entries[1:, 0] == entries[:-1, 0]) & (entries[1:, 1] == entries[:-1, 1])
    if same.any():
        raise _duplicates(table, order, np.flatnonzero(same))
    return IndexArrays(entries, np.ascontiguousarray(entries[::CHUNK_ENTRIES, :2]))


def id_keys(ids: npt.NDArray[Any]) -> Keys:
    """Give (key, check) of ids that are int64 or an object array of `str`.

    Raises
    ------
    TransferSetError
        A string is no valid Unicode.
    """
    if ids.dtype.kind == "i":
        return ids.astype(np.int64, copy=False).view(np.uint64), np.zeros(len(ids), np.uint64)
    halves = np.empty((len(ids), 2), np.uint64)
    try:
        for start in range(0, len(ids), _HASHED_AT_ONCE):
            block = [
                hashlib.blake2b(value.encode(), digest_size=16).digest() for value in ids[start:][:_HASHED_AT_ONCE]
            ]
            halves[start : start + len(block)] = np.frombuffer(b"".join(block), dtype="<u8").reshape(-1, 2)
    except UnicodeEncodeError as error:
        raise TransferSetError(f"an example id is no valid Unicode: {error}") from error
    return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])


class IdIndex:
    """Looks example ids up; safe between threads.

    Parameters
    ----------
    reader : ShardedReader
        The entries.
    fences : ndarray [chunk, bound] of uint64
        (key, check) of the first entry of each chunk; what stands behind these is not looked at.
    num_examples : int
        Entries that are not padding.
    num_rows : int
        Rows of a view; no entry may point past them.
    example_id_type : {"int64", "string"}
        The type of the cache's ids.
    place : Place
        Where the entries stand, for messages.
    """

    def __init__(
        self,
        reader: ShardedReader,
        fences: npt.NDArray[np.uint64],
        *,
        num_examples: int,
        num_rows: int,
        example_id_type: str,
        place: Place,
    ) -> None:
        self._reader = reader
        self._fences = fences
        self._num_examples = num_examples
        self._num_rows = num_rows
        self._example_id_type = example_id_type
        self._place = place

    def lookup(self, example_ids: ExampleIds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Find examples' rows, in the order of the ids; duplicates allowed.

        Parameters
        ----------
        example_ids : sequence or ndarray [example]
            Ids of the cache's own type; a tensor of integers is taken too.

        Returns
        -------
        first_row : ndarray [example] of int64
            Each example's first row within a view.
        num_rows : ndarray [example] of int32
            Each example's rows within a view.

        Raises
        ------
        UnknownExampleError
            Some ids are not in the cache, or are of the other type.
        TransferSetError
            The ids are no list, or neither integers nor strings; bool and float are refused.
        CorruptCacheError
            The index is missing, torn or altered.
        """
        ids = ids_as_given(example_ids)
        if not len(ids):
            return np.empty(0, np.int64), np.empty(0, np.int32)
        if isinstance(ids[0], str) != (self._example_id_type == "string"):
            raise self._unknown(ids, np.ones(len(ids), bool))
        outside = outside_int64(ids)
        found, known = self._find(np.where(outside, 0, ids).astype(np.int64) if outside.any() else ids)
        known &= ~outside
        if not known.all():
            raise self._unknown(ids, ~known)
        self._refuse_rows_outside(ids, found)
        return found[:, 0].astype(np.int64), found[:, 1].astype(np.int32)

    def _find(self, ids: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Give each id's (first_row, num_rows), and whether it is in the cache."""
        key, check = id_keys(ids)
        chunk_of = _last_not_above((self._fences[:, 0], self._fences[:, 1]), (key, check))
        found = np.zeros((len(ids), 2), np.uint64)
        known = np.zeros(len(ids), bool)
        positions = by_chunk(chunk_of)
        positions.pop(-1, None)  # ids below all of the cache's
        chunks = list(positions)
        for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
            group = chunks[start : start + _CHUNKS_AT_ONCE]
            members = np.concatenate([positions[chunk_index] for chunk_index in group])
            read = dict(self._reader.chunks(group))
            entries = np.concatenate([read[chunk_index] for chunk_index in group])
            num_padding = max(0, (group[-1] + 1) * CHUNK_ENTRIES - self._num_examples)
            entries = entries[: len(entries) - num_padding]
            place = _last_not_above((entries[:, 0], entries[:, 1]), (key[members], check[members]))
            entry = entries[np.maximum(place, 0)]
            known[members] = (entry[:, 0] == key[members]) & (entry[:, 1] == check[members])
            found[members] = entry[:, 2:]
        return found, known

    def _refuse_rows_outside(self, ids: npt.NDArray[Any], found: npt.NDArray[np.uint64]) -> None:
        first_row, num_rows = found[:, 0], found[:, 1]
        total = np.uint64(self._num_rows)
        # The row after the last is total at most, written so that no sum can run over.
        outside = (num_rows < 1) | (num_rows > total) | (first_row > total - np.minimum(num_rows, total))
        if outside.any():
            example = int(np.argmax(outside))
            raise self._place.corrupt(
                f"the entry of example {ids.item(example)!r} says {num_rows[example]} rows from row "
                f"{first_row[example]}, where a view has {self._num_rows} rows"
            )

    def _unknown(self, ids: npt.NDArray[Any], unknown: npt.NDArray[np.bool_]) -> UnknownExampleError:
        missing = ids[unknown]
        named = ", ".join(repr(value) for value in missing[:_NAMED].tolist())
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        given = "string" if isinstance(ids[0], str) else "int64"
        hint = "Check that the cache was built from this transfer set."
        if given != self._example_id_type:
            convert = "int(value)" if self._example_id_type == "int64" else "str(value)"
            hint = f"You gave {given} ids; convert them, such as [{convert} for value in ids]."
        return UnknownExampleError(
            f"{self._place.address}: {len(missing)} of {len(ids)} example ids are not in this cache: {named}{more}. "
            f"Its ids are {self._example_id_type}. {hint}"
        )


def _last_not_above(bounds: Keys, wanted: Keys) -> npt.NDArray[np.int64]:
    """Give the position of the last bound that is not above each wanted (key, check), or -1; bounds ascend."""
    keys, checks = bounds
    key, check = wanted
    place = np.searchsorted(keys, key, side="right").astype(np.int64) - 1
    # Two ids share a key once in 2^64 pairs; then the check decides, a step at a time.
    above = (place >= 0) & (keys[place] == key) & (checks[place] > check)
    while above.any():
        place[above] -= 1
        above = (place >= 0) & (keys[place] == key) & (checks[place] > check)
    return place


def _duplicates(
    table: ExampleTable, order: npt.NDArray[np.int64], repeated: npt.NDArray[np.int64]
) -> DuplicateExampleError:
    pairs = [(int(order[place]), int(order[place + 1])) for place in repeated[:_NAMED]]
    named = ", ".join(f"{table.example_ids.item(first)!r} at {first} and {second}" for first, second in pairs)
    more = f", and {len(repeated) - _NAMED} more" if len(repeated) > _NAMED else ""
    return DuplicateExampleError(
        f"{len(repeated)} example ids stand more than once in the transfer set: {named}{more}. Nothing was written. "
        "Give every example an id of its own, such as its file's path."
    )
