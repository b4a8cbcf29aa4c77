"""A small cache in a folder, written with the store alone."""

import numpy as np
import pytest
from store_builders import NUM_ROWS, Written, make_cache_document, make_teacher_document

from kdcache.store import CacheStore, ExampleTable


@pytest.fixture
def table():
    return ExampleTable.make([f"image-{index:03}" for index in range(NUM_ROWS)], labels=np.arange(NUM_ROWS) % 10)


@pytest.fixture
def started(tmp_path, table):
    """A store with root, examples and index, and no teacher."""
    store = CacheStore.at(tmp_path / "cache")
    store.write_root(make_cache_document())
    store.write_examples(table)
    store.write_index(table)
    return store


@pytest.fixture
def written(started, table):
    """A store with one teacher, all of whose shards are published."""
    cache_document = started.cache_document()
    codebook = np.linspace(0, 9, 254, dtype=np.float32)
    teacher_document = started.publish_teacher(make_teacher_document(), {"codebook": codebook})
    codes = np.random.default_rng(0).integers(0, 254, (NUM_ROWS, 11)).astype(np.uint8)
    cache = Written(started, cache_document, teacher_document, table, codes)
    for shard_index in range(cache_document.num_shards):
        started.publish_shard(teacher_document, cache_document, shard_index, cache.rows_of_shard(shard_index))
    return cache
