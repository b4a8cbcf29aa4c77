"""The id index as files of a cache."""

from __future__ import annotations

__all__ = ["index_digest", "open_index", "publish_index"]

import hashlib

from kdcache.documents import CacheDocument
from kdcache.store import arrays, layout
from kdcache.store.examples import ExampleTable
from kdcache.store.files import CacheFiles
from kdcache.store.index import CHUNK_ENTRIES, IdIndex, index_arrays, index_spec
from kdcache.store.reader import ShardedReader
from kdcache.store.shards import encode_shard

_FENCES_CHUNK = layout.chunk_key(layout.INDEX_FENCES, (0, 0))


def publish_index(files: CacheFiles, table: ExampleTable) -> None:
    """Store the id index of a table, whatever part of it is missing.

    Raises
    ------
    DuplicateExampleError
        An example_id stands more than once; nothing is written.
    """
    index = index_arrays(table)
    spec = index_spec(len(table))
    num_shards = -(-len(table) // spec.shard_rows)
    for shard in range(num_shards):
        key = layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0))
        if files.objects.size(key) is None:
            rows = index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows]
            files.objects.publish(key, encode_shard(rows, spec))
    files.objects.publish(_FENCES_CHUNK, arrays.encode_small_array(index.fences))
    entries = arrays.sharded_array_metadata(num_shards, spec, dimension_names=("entry", "field"))
    fences = arrays.small_array_metadata(index.fences, dimension_names=("chunk", "bound"))
    files.publish_json(layout.metadata_key(layout.INDEX_ENTRIES), entries)
    files.publish_json(layout.metadata_key(layout.INDEX_FENCES), fences)


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
        example_id_type=cache_document.example_id_type,
        address=files.address,
    )


def index_digest(files: CacheFiles) -> str:
    """SHA-256 over key, size and bytes of every file of the index, keys ascending."""
    digest = hashlib.sha256()
    for key in sorted(files.objects.list(layout.INDEX)):
        data = files.objects.read(key)
        digest.update(f"{key}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
