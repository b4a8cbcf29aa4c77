"""The id index as files of a cache."""

from __future__ import annotations

__all__ = ["fences_sha256", "index_digest", "open_index", "publish_index"]

import functools
import hashlib

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument
from kdcache.store import arrays, layout
from kdcache.store.checksums import CHECKSUM_BYTES
from kdcache.store.examples import ExampleTable
from kdcache.store.files import CacheFiles
from kdcache.store.index import CHUNK_ENTRIES, IdIndex, index_arrays, index_spec
from kdcache.store.place import Place
from kdcache.store.reader import ShardedReader
from kdcache.store.shards import ShardSpec, checksums_of_chunks, decode_shard, encode_shard

_FENCE_BYTES = 8
_BOUNDS = 2
"""Columns of the fences that are bounds; those of earlier releases have no other."""
_FENCES_CHUNK = layout.chunk_key(layout.INDEX_FENCES, (0, 0))


def publish_index(files: CacheFiles, table: ExampleTable) -> None:
    """Store the id index of a table, whatever part of it is missing, and check the parts that stand.

    Raises
    ------
    DuplicateExampleError
        An example_id stands more than once; nothing is written.
    CorruptCacheError
        A part that stands is damaged, or is that of another table.
    """
    index = index_arrays(table)
    spec = index_spec(len(table))
    num_shards = -(-len(table) // spec.shard_rows)
    checksums = []
    for shard in range(num_shards):
        place = files.index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0)))
        _publish_entries(files, place, index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows], spec)
        checksums.append(checksums_of_chunks(files.read(place), spec, place=place))  # of what stands
    fences = _publish_fences(files, index.fences, b"".join(checksums))
    entries = arrays.sharded_array_metadata(num_shards, spec, dimension_names=("entry", "field"))
    metadata = arrays.small_array_metadata(fences, dimension_names=("chunk", "bound"))
    files.publish_metadata(files.index_place(layout.metadata_key(layout.INDEX_ENTRIES)), entries)
    files.publish_metadata(files.index_place(layout.metadata_key(layout.INDEX_FENCES)), metadata)


def _publish_fences(files: CacheFiles, bounds: npt.NDArray[np.uint64], checksums: bytes) -> npt.NDArray[np.uint64]:
    """Store the fences unless they stand, and give them; those of an earlier release, without checksums, may stand."""
    fences = np.column_stack([bounds, np.frombuffer(checksums, "<u4")[: len(bounds)].astype(np.uint64)])
    place = files.index_place(_FENCES_CHUNK)
    standing_bytes = files.objects.size(place.key)
    earlier = np.ascontiguousarray(bounds)
    if standing_bytes is not None and standing_bytes == len(arrays.encode_small_array(earlier)):
        fences = earlier
    files.publish_small_array(place, fences)
    return fences


def fences_sha256(files: CacheFiles) -> str:
    """Digest of the fences' file."""
    return hashlib.sha256(files.read(files.index_place(_FENCES_CHUNK))).hexdigest()


def open_index(files: CacheFiles, cache_document: CacheDocument, *, fences_sha256: str | None = None) -> IdIndex:
    """Open the id index: reads the fences and nothing else.

    Parameters
    ----------
    files : CacheFiles
    cache_document : CacheDocument
    fences_sha256 : str, optional
        The digest that complete.json names for the fences.

    Raises
    ------
    CorruptCacheError
        The fences are missing, torn or altered, or another index's.
    """
    num_examples = cache_document.num_examples
    spec = index_spec(num_examples)
    place = files.index_place(_FENCES_CHUNK)
    data = files.read(place)
    num_chunks = -(-num_examples // CHUNK_ENTRIES)
    has_checksums = len(data) > num_chunks * _BOUNDS * _FENCE_BYTES + CHECKSUM_BYTES
    shape = (num_chunks, _BOUNDS + has_checksums)
    fences = arrays.decode_small_array(data, dtype="uint64", shape=shape, place=place)
    if fences_sha256 is not None and hashlib.sha256(data).hexdigest() != fences_sha256:
        raise place.corrupt("the fences are sound, but not those that complete.json vouches for")
    checksums = fences[:, _BOUNDS].astype("<u4") if has_checksums else None
    reader = ShardedReader(
        files.objects,
        lambda shard: files.index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0))),
        spec,
        -(-num_examples // spec.shard_rows),
        expected_of=None if checksums is None else functools.partial(_expected, checksums, spec),
    )
    return IdIndex(
        reader,
        fences,
        num_examples=num_examples,
        num_rows=cache_document.num_rows,
        example_id_type=cache_document.example_id_type,
        place=files.index_place(layout.INDEX_ENTRIES),
    )


def _expected(checksums: npt.NDArray[np.uint32], spec: ShardSpec, shard_index: int) -> bytes:
    """Give the checksums of a shard's chunks; those behind the last entry are never read."""
    first = shard_index * spec.num_chunks
    found = checksums[first : first + spec.num_chunks].tobytes()
    return found.ljust(spec.num_chunks * CHECKSUM_BYTES, b"\0")


def _publish_entries(files: CacheFiles, place: Place, entries: npt.NDArray[np.uint64], spec: ShardSpec) -> None:
    if files.objects.size(place.key) is None and files.objects.publish(place.key, encode_shard(entries, spec)):
        return
    # complete.json will vouch for what stands, so it must be what this build would have written.
    standing = decode_shard(files.read(place), spec, place=place)
    same = np.array_equal(standing[: len(entries)], entries)
    if not same or (standing[len(entries) :] != np.uint64(spec.fill)).any():
        raise place.corrupt("the entries that stand there are not those that follow from the examples")


def index_digest(files: CacheFiles) -> str:
    """SHA-256 over key, size and bytes of every file of the index, keys ascending."""
    digest = hashlib.sha256()
    for key in sorted(files.objects.list(layout.INDEX)):
        data = files.objects.read(key)
        digest.update(f"{key}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
