"""The id index as files of a cache."""

from __future__ import annotations

__all__ = ["damaged_parts", "fences_sha256", "index_digest", "open_index", "publish_index"]

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument
from kdcache.errors import CorruptCacheError
from kdcache.store import arrays, layout
from kdcache.store.checksums import CHECKSUM_BYTES
from kdcache.store.examples import ExampleTable
from kdcache.store.files import CacheFiles
from kdcache.store.index import CHUNK_ENTRIES, IdIndex, index_arrays, index_spec
from kdcache.store.place import Place
from kdcache.store.reader import Expected, ShardedReader
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
        entries = index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows]
        checksums.append(_publish_entries(files, place, entries, spec))
    fences = _publish_fences(files, index.fences, b"".join(checksums))
    stored = arrays.sharded_array_metadata(num_shards, spec, dimension_names=("entry", "field"))
    metadata = arrays.small_array_metadata(fences, dimension_names=("chunk", "bound"))
    files.publish_metadata(files.index_place(layout.metadata_key(layout.INDEX_ENTRIES)), stored)
    files.publish_metadata(files.index_place(layout.metadata_key(layout.INDEX_FENCES)), metadata)


def _publish_fences(files: CacheFiles, bounds: npt.NDArray[np.uint64], checksums: bytes) -> npt.NDArray[np.uint64]:
    """Store the fences unless they stand, and give them; those of an earlier release, without checksums, may stand."""
    place = files.index_place(_FENCES_CHUNK)
    fences = _with_checksums(bounds, checksums)
    if _has_earlier_fences(files, place, len(bounds)):
        fences = np.ascontiguousarray(bounds)
    files.publish_small_array(place, fences)
    return fences


def _has_earlier_fences(files: CacheFiles, place: Place, num_chunks: int) -> bool:
    """Tell whether fences without checksums stand, or their metadata."""
    metadata = files.read_json(files.index_place(layout.metadata_key(layout.INDEX_FENCES)))
    if metadata is not None:
        return metadata.get("shape") == [num_chunks, _BOUNDS]
    return files.objects.size(place.key) is not None and _num_fields(files.read(place), num_chunks) == _BOUNDS


def fences_sha256(files: CacheFiles) -> str:
    """Digest of the fences' file."""
    return hashlib.sha256(files.read(files.index_place(_FENCES_CHUNK))).hexdigest()


def damaged_parts(files: CacheFiles, table: ExampleTable) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) of each part of the index that stands and does not follow from the examples."""
    index, spec = index_arrays(table), index_spec(len(table))
    checksums: list[bytes] = []
    for shard in range(-(-len(table) // spec.shard_rows)):
        place = files.index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0)))
        entries = index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows]
        if files.objects.size(place.key) is not None:
            check = functools.partial(_check_entries, files, place, entries, spec)
            yield from _told(lambda check=check: checksums.append(check()), place)  # type: ignore[misc]
    place = files.index_place(_FENCES_CHUNK)
    if files.objects.size(place.key) is not None:
        yield from _told(functools.partial(_check_fences, files, place, index.fences, b"".join(checksums)), place)


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
    shape = (num_chunks, _num_fields(data, num_chunks))
    fences = arrays.decode_small_array(data, dtype="uint64", shape=shape, place=place)
    if fences_sha256 is not None and hashlib.sha256(data).hexdigest() != fences_sha256:
        raise place.corrupt("the fences are sound, but not those that complete.json vouches for")
    checksums = fences[:, _BOUNDS].astype("<u4") if shape[1] > _BOUNDS else None
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


def _expected(checksums: npt.NDArray[np.uint32], spec: ShardSpec, shard_index: int) -> Expected:
    """Give the checksums of a shard's chunks; those behind the last entry are never read."""
    first = shard_index * spec.num_chunks
    found = checksums[first : first + spec.num_chunks].tobytes()
    return Expected(checksums=found.ljust(spec.num_chunks * CHECKSUM_BYTES, b"\0"))


def _publish_entries(files: CacheFiles, place: Place, entries: npt.NDArray[np.uint64], spec: ShardSpec) -> bytes:
    """Store a shard of entries unless one stands; gives the checksums of the chunks that stand then."""
    if files.objects.size(place.key) is None:
        data = encode_shard(entries, spec)
        if files.objects.publish(place.key, data):
            return checksums_of_chunks(data, spec, place=place)
    return _check_entries(files, place, entries, spec)


def _check_entries(files: CacheFiles, place: Place, entries: npt.NDArray[np.uint64], spec: ShardSpec) -> bytes:
    # complete.json will vouch for what stands, so it must be what this build would have written.
    data = files.read(place)
    standing = decode_shard(data, spec, place=place)
    same = np.array_equal(standing[: len(entries)], entries)
    if not same or (standing[len(entries) :] != np.uint64(spec.fill)).any():
        raise place.corrupt("the entries that stand there are not those that follow from the examples")
    return checksums_of_chunks(data, spec, place=place)


def _check_fences(files: CacheFiles, place: Place, bounds: npt.NDArray[np.uint64], checksums: bytes) -> None:
    """Hold the fences that stand against those that follow; checksums of chunks that are lost are not looked at."""
    data = files.read(place)
    shape = (len(bounds), _num_fields(data, len(bounds)))
    standing = arrays.decode_small_array(data, dtype="uint64", shape=shape, place=place)
    same = np.array_equal(standing[:, :_BOUNDS], bounds)
    if shape[1] > _BOUNDS and len(checksums) >= len(bounds) * CHECKSUM_BYTES:
        same &= np.array_equal(standing, _with_checksums(bounds, checksums))
    if not same:
        raise place.corrupt("the fences that stand there are not those that follow from the examples")


def _with_checksums(bounds: npt.NDArray[np.uint64], checksums: bytes) -> npt.NDArray[np.uint64]:
    return np.column_stack([bounds, np.frombuffer(checksums, "<u4")[: len(bounds)].astype(np.uint64)])


def _num_fields(data: bytes, num_chunks: int) -> int:
    """Tell by the size of the fences' file whether it has checksums."""
    return _BOUNDS + (len(data) > num_chunks * _BOUNDS * _FENCE_BYTES + CHECKSUM_BYTES)


def _told(check: Callable[[], None], place: Place) -> Iterator[tuple[str, str]]:
    try:
        check()
    except CorruptCacheError as error:
        yield place.key, str(error)


def index_digest(files: CacheFiles, keys: Iterable[str] | None = None) -> str:
    """SHA-256 over key, size and bytes of every file of the index, or of `keys` alone, keys ascending."""
    digest = hashlib.sha256()
    for key in sorted(files.objects.list(layout.INDEX) if keys is None else keys):
        data = files.objects.read(key)
        digest.update(f"{key}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
