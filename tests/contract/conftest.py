"""One cache a stored type, written with the store alone, whose last shard is padded."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from kdcache.documents import CacheDocument, Codes, Fingerprint, Lossless, TeacherDocument
from kdcache.store import CacheStore, ExampleTable

NUM_ROWS = 250
SPECS = {
    "uint8": Codes(dtype="uint8"),
    "uint16": Codes(dtype="uint16"),
    "float16": Lossless(dtype="float16"),
    "float32": Lossless(dtype="float32"),
}


@dataclass(frozen=True)
class Written:
    """A cache of one teacher, and the stored codes that were put into it."""

    path: str
    store: CacheStore
    cache_document: CacheDocument
    teacher_document: TeacherDocument
    codes: np.ndarray
    consolidated: bool = False

    @property
    def dtype(self):
        return self.teacher_document.storage_dtype


def make_codes(dtype):
    generator = np.random.default_rng(0)
    if dtype.startswith("float"):
        return generator.normal(0, 5, (NUM_ROWS, 11)).astype(dtype)
    return generator.integers(0, np.iinfo(dtype).max, (NUM_ROWS, 11)).astype(dtype)


def write_cache(path, dtype):
    store = CacheStore.at(path)
    cache_document = CacheDocument.make(
        num_classes=11 if dtype.startswith("float") else 10,
        num_examples=NUM_ROWS,
        num_rows=NUM_ROWS,
        shard_rows=96,
        chunk_rows=32,
        example_id_type="int64",
        transfer_set_digest="0" * 64,
        has_labels=False,
        has_input_digests=False,
    )
    table = ExampleTable.make(np.arange(NUM_ROWS))
    store.write_root(cache_document)
    store.write_examples(table)
    store.write_index(table)
    document = TeacherDocument.make(
        name="a",
        members=(Fingerprint.make(name="a", source="models:net", weights_sha256="1" * 64),),
        num_classes=cache_document.num_classes,
        codec=SPECS[dtype],
        num_columns=11,
        storage_dtype=dtype,
        parameters={},
        num_pilot_rows=10,
    )
    document = store.publish_teacher(document, {"codebook": np.linspace(0, 9, 254, dtype=np.float32)})
    codes = make_codes(dtype)
    for shard_index in range(cache_document.num_shards):
        start = shard_index * cache_document.shard_rows
        rows = codes[start : start + cache_document.rows_in_shard(shard_index)]
        store.publish_shard(document, cache_document, shard_index, rows)
    return Written(str(path), store, cache_document, document, codes)


@pytest.fixture(params=["consolidated", "not consolidated"])
def written(request, tmp_path, dtype):
    cache = write_cache(tmp_path / "cache", dtype)
    if request.param == "not consolidated":
        return cache
    cache.store.consolidate()
    return replace(cache, consolidated=True)


@pytest.fixture(params=SPECS)
def dtype(request):
    return request.param
