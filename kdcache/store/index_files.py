"""The id index as files of a cache."""

from __future__ import annotations

__all__ = ["damaged_parts", "index_digest", "open_index", "publish_index"]

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument
from kdcache.errors import CorruptCacheError
from kdcache.store import arrays, layout
from kdcache.store.examples import ExampleTable
from kdcache.store.files import CacheFiles
from kdcache.store.index import CHUNK_ENTRIES, IdIndex, index_arrays, index_spec
from kdcache.store.place import Place
from kdcache.store.reader import ShardedReader
from kdcache.store.shards import ShardSpec, decode_shard, encode_shard

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
    for shard in range(num_shards):
        place = files.index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0)))
        _publish_entries(files, place, index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows], spec)
    files.publish_small_array(files.index_place(_FENCES_CHUNK), index.fences)
    entries = arrays.sharded_array_metadata(num_shards, spec, dimension_names=("entry", "field"))
    fences = arrays.small_array_metadata(index.fences, dimension_names=("chunk", "bound"))
    files.publish_metadata(files.index_place(layout.metadata_key(layout.INDEX_ENTRIES)), entries)
    files.publish_metadata(files.index_place(layout.metadata_key(layout.INDEX_FENCES)), fences)


def damaged_parts(files: CacheFiles, table: ExampleTable) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) of each part of the index that stands and does not follow from the examples."""
    index, spec = index_arrays(table), index_spec(len(table))
    for shard in range(-(-len(table) // spec.shard_rows)):
        place = files.index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0)))
        entries = index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows]
        if files.objects.size(place.key) is not None:
            yield from _told(functools.partial(_check_entries, files, place, entries, spec), place)
    place = files.index_place(_FENCES_CHUNK)
    if files.objects.size(place.key) is not None:
        yield from _told(functools.partial(_check_fences, files, place, index.fences), place)


def open_index(files: CacheFiles, cache_document: CacheDocument) -> IdIndex:
    """Open the id index: reads the fences and nothing else.

    Raises
    ------
    CorruptCacheError
        The fences are missing, torn or altered.
    """
    num_examples = cache_document.num_examples
    spec = index_spec(num_examples)
    place = files.index_place(_FENCES_CHUNK)
    shape = (-(-num_examples // CHUNK_ENTRIES), 2)
    fences = arrays.decode_small_array(files.read(place), dtype="uint64", shape=shape, place=place)
    reader = ShardedReader(
        files.objects,
        lambda shard: files.index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0))),
        spec,
        -(-num_examples // spec.shard_rows),
    )
    return IdIndex(
        reader,
        fences,
        num_examples=num_examples,
        num_rows=cache_document.num_rows,
        example_id_type=cache_document.example_id_type,
        place=files.index_place(layout.INDEX_ENTRIES),
    )


def _publish_entries(files: CacheFiles, place: Place, entries: npt.NDArray[np.uint64], spec: ShardSpec) -> None:
    if files.objects.size(place.key) is None and files.objects.publish(place.key, encode_shard(entries, spec)):
        return
    _check_entries(files, place, entries, spec)


def _check_entries(files: CacheFiles, place: Place, entries: npt.NDArray[np.uint64], spec: ShardSpec) -> None:
    # complete.json will vouch for what stands, so it must be what this build would have written.
    standing = decode_shard(files.read(place), spec, place=place)
    same = np.array_equal(standing[: len(entries)], entries)
    if not same or (standing[len(entries) :] != np.uint64(spec.fill)).any():
        raise place.corrupt("the entries that stand there are not those that follow from the examples")


def _check_fences(files: CacheFiles, place: Place, fences: npt.NDArray[np.uint64]) -> None:
    standing = arrays.decode_small_array(files.read(place), dtype="uint64", shape=fences.shape, place=place)
    if not np.array_equal(standing, fences):
        raise place.corrupt("the fences that stand there are not those that follow from the examples")


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
