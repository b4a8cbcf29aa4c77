import json
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from store_builders import NUM_ROWS, make_cache_document, make_plan, make_teacher_document
from tiny_caches import build_tiny

from kdcache.documents import CertificateDocument, CompleteDocument, CompletedTeacher, Histogram, Record
from kdcache.errors import (
    CacheNotFoundError,
    CodecError,
    CorruptCacheError,
    DocumentError,
    PlanMismatchError,
    ShapeError,
)
from kdcache.store import CacheStore, ExampleTable
from kdcache.store.arrays import encode_small_array
from kdcache.store.shards import encode_shard


def make_certificate():
    return CertificateDocument.make(
        temperatures=(1.0,),
        mean_kl=(0.0,),
        max_kl=(0.0,),
        kl_histograms=(Histogram(num_zeros=3),),
        num_measured_rows=3,
    )


def make_record(shard_index=0, teacher="a"):
    return Record.make(
        teacher=teacher,
        shard_index=shard_index,
        num_rows=128,
        num_bytes=10,
        sha256="2" * 64,
        min_logit=-1.0,
        max_logit=1.0,
        certificate=make_certificate(),
    )


def make_complete(plan_index=0):
    teacher = CompletedTeacher.make(
        name="a",
        num_shards=1,
        num_bytes=10,
        document_digest="3" * 64,
        records_digest="4" * 64,
        data_digest="5" * 64,
        certificate=make_certificate(),
    )
    return CompleteDocument.make(
        plan_index=plan_index,
        plan_digest="6" * 64,
        examples_sha256="7" * 64,
        index_digest="8" * 64,
        teachers=(teacher,),
        data_digest="9" * 64,
    )


@pytest.fixture
def store(tmp_path):
    return CacheStore.at(tmp_path / "cache")


def test_a_store_can_be_named_before_anything_is_there(store, tmp_path):
    assert store.address == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_store_can_be_sent_to_another_process(started, table):
    started.lookup(table.example_ids[:1])
    copy = pickle.loads(pickle.dumps(started))  # noqa: S301 - our own object
    assert copy.cache_document() == started.cache_document()


def test_importing_the_store_needs_neither_zarr_nor_torch_nor_dask():
    program = "import sys, kdcache.store; print([name for name in ('zarr', 'torch', 'dask') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_opening_and_reading_a_cache_needs_no_pyarrow(written):
    program = (
        "import sys, kdcache; kdcache.open_cache(sys.argv[1], allow_incomplete=True); from kdcache.store import "
        "CacheStore; CacheStore.at(sys.argv[1]).lookup(['image-007']); print('pyarrow' in sys.modules)"
    )
    command = [sys.executable, "-c", program, written.store.address]
    assert subprocess.check_output(command, text=True) == "False\n"


# Plans


def test_no_plans_stand_at_first(store):
    assert store.plans() == []


def test_plans_read_back_in_their_order(store):
    plans = [make_plan(make_cache_document()), make_plan(make_cache_document(), names=("a", "b"))]
    for index, plan in enumerate(plans):
        assert store.publish_plan(index, plan)
    assert store.plans() == plans


def test_a_second_plan_of_the_same_number_is_not_stored(store):
    first = make_plan(make_cache_document())
    store.publish_plan(0, first)
    assert not store.publish_plan(0, make_plan(make_cache_document(), names=("b",)))
    assert store.plans() == [first]


def test_a_plan_that_breaks_its_schema_is_named(store):
    store.objects.publish("plans/0.json", b'{"batch_size": 0}')
    with pytest.raises(DocumentError, match=r"plans/0\.json is no valid plan document"):
        store.plans()


# Root


def test_the_cache_document_reads_back(store):
    store.write_root(make_cache_document())
    assert store.cache_document() == make_cache_document()


def test_writing_the_same_root_again_changes_nothing(store):
    store.write_root(make_cache_document())
    before = store.objects.read("zarr.json")
    store.write_root(make_cache_document())
    assert store.objects.read("zarr.json") == before


def test_another_root_is_refused_with_both_sides(store):
    store.write_root(make_cache_document())
    with pytest.raises(PlanMismatchError, match="num_classes: this plan 11, the cache 10"):
        store.write_root(make_cache_document(num_classes=11))


def test_an_address_without_a_cache_is_an_error_that_says_how_to_build_one(store):
    with pytest.raises(CacheNotFoundError, match=r"holds no cache.*kdcache build"):
        store.cache_document()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "is no Zarr group of a kdcache cache"),
        ('{"node_type": "group", "attributes": {}}', "is no Zarr group of a kdcache cache"),
        ('{"node_type": "group", "attributes": {"kdcache": {"num_rows": 3}}}', r"num_classes: Field required"),
    ],
)
def test_a_root_without_a_cache_document_is_named(store, text, problem):
    store.objects.publish("zarr.json", text.encode())
    with pytest.raises(DocumentError, match=f"zarr.json is no valid cache document(.|\n)*{problem}"):
        store.cache_document()


@pytest.mark.parametrize("text", ["", "{", "[]", "\\x", "[" * 100_000])
def test_a_root_that_is_no_json_object_is_corrupt(store, text):
    store.objects.publish("zarr.json", text.encode())
    with pytest.raises(CorruptCacheError, match=r"zarr\.json: the file is no JSON"):
        store.cache_document()


@pytest.mark.parametrize("key", ["zarr.json", "complete.json", "commits/a/0.json"])
def test_a_document_too_large_for_any_is_refused_before_it_is_read(store, tmp_path, key):
    store.objects.publish(key, b"{}")
    os.truncate(tmp_path / "cache" / key, 2**26 + 1)
    reads = {"zarr.json": store.cache_document, "complete.json": store.complete}
    read = reads.get(key, lambda: store.record("a", 0))
    tracemalloc.start()
    with pytest.raises(CorruptCacheError, match=f"{key}: the file has 67108865 bytes; no JSON document of a cache has"):
        read()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


# Examples


def test_the_examples_read_back(started, table):
    assert started.examples().equals(table)


def test_writing_the_same_examples_again_changes_nothing(started, table):
    before = started.examples_sha256()
    started.write_examples(table)
    assert started.examples_sha256() == before


def test_other_examples_are_refused(started):
    with pytest.raises(CorruptCacheError, match="not those of the plan"):
        started.write_examples(ExampleTable.make(["other"]))


def test_a_single_column_reads_by_name(started):
    np.testing.assert_array_equal(started.example_column("label"), np.arange(NUM_ROWS) % 10)


def test_missing_examples_are_corrupt(started):
    started.objects.delete("examples.parquet")
    with pytest.raises(CorruptCacheError, match=r"examples\.parquet: the file is missing.*kdcache verify"):
        started.examples()


def test_the_index_digest_is_the_same_for_the_same_examples(started, table, tmp_path):
    other = CacheStore.at(tmp_path / "other")
    other.write_root(make_cache_document())
    other.write_index(table)
    assert other.index_digest() == started.index_digest()


def test_the_index_digest_changes_with_any_byte(started):
    before = started.index_digest()
    key = "index/entries/c/0/0"
    started.objects.replace(key, started.objects.read(key) + b"x")
    assert started.index_digest() != before


def test_a_missing_part_of_the_index_is_written_again(started, table):
    before = started.index_digest()
    started.objects.delete("index/entries/c/0/0")
    started.write_index(table)
    assert started.index_digest() == before


# Teachers


def test_a_teacher_that_is_not_there_is_none(started):
    assert started.teacher("a") is None


def test_a_published_teacher_names_its_parameters(started):
    document = started.publish_teacher(make_teacher_document(), {"codebook": np.arange(254, dtype=np.float32)})
    assert started.teacher("a") == document
    assert document.parameters["codebook"].shape == (254,)
    assert document.parameters_group.startswith("parameters-")


@pytest.mark.parametrize(
    "parameter",
    [
        np.arange(254, dtype=np.float32),
        np.float64(3.5) * np.ones(()),
        np.zeros((0, 4), np.uint8),
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.arange(6, dtype=">u2"),
        np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    ],
)
def test_parameters_of_any_shape_read_back(started, parameter):
    document = started.publish_teacher(make_teacher_document(), {"p": parameter})
    read = started.parameters(document)["p"]
    np.testing.assert_array_equal(read, parameter)
    assert read.dtype == parameter.dtype.newbyteorder("=")


def test_a_teacher_without_parameters_has_no_group_for_them(started):
    document = started.publish_teacher(make_teacher_document(), {})
    assert document.parameters_group is None
    assert started.parameters(document) == {}


def test_the_first_fit_stands_and_the_second_is_told(started):
    first = started.publish_teacher(make_teacher_document(), {"codebook": np.zeros(254, np.float32)})
    second = started.publish_teacher(make_teacher_document(), {"codebook": np.ones(254, np.float32)})
    assert second == first
    assert (started.parameters(second)["codebook"] == 0).all()


def test_the_first_document_stands_and_the_second_is_told(started):
    first = started.publish_teacher(make_teacher_document(), {})
    assert started.publish_teacher(make_teacher_document(weights_sha256="9" * 64), {}) == first


def test_the_documents_come_after_the_parameters(started, monkeypatch):
    keys = []
    kind = type(started.objects)
    publish = kind.publish
    monkeypatch.setattr(kind, "publish", lambda self, key, data: keys.append(key) or publish(self, key, data))
    document = started.publish_teacher(make_teacher_document(), {"codebook": np.zeros(254, np.float32)})
    group = f"teachers/a/{document.parameters_group}"
    assert keys == [
        f"{group}/codebook/c/0",
        f"{group}/codebook/zarr.json",
        f"{group}/zarr.json",
        "teachers/a/zarr.json",
        "teachers/a/codes/zarr.json",
    ]


def parameter_key(written):
    return f"teachers/a/{written.teacher_document.parameters_group}/codebook/c/0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: b"", "has 0 bytes where its shape"),
        (lambda data: data[:-1], "has 1019 bytes where its shape"),
        (lambda data: b"x" + data[1:], "checksum does not match"),
    ],
)
def test_an_altered_parameter_is_corrupt(written, change, reason):
    key = parameter_key(written)
    written.store.objects.replace(key, change(written.store.objects.read(key)))
    with pytest.raises(CorruptCacheError, match=reason):
        written.store.parameters(written.teacher_document)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: b"", "has 0 bytes where its shape"),
        (lambda data: b"x" + data[1:], "checksum does not match"),
        (lambda _: encode_small_array(np.zeros(254, np.float32)), "is not the one that this build would write"),
    ],
)
def test_a_parameter_that_a_stopped_build_left_damaged_is_never_vouched_for(written, change, reason):
    key = parameter_key(written)
    written.store.objects.replace(key, change(written.store.objects.read(key)))
    codebook = {"codebook": np.linspace(0, 9, 254, dtype=np.float32)}
    with pytest.raises(CorruptCacheError, match=f"{reason}.*Delete {key} and run the build again"):
        written.store.publish_teacher(make_teacher_document(), codebook)


@pytest.mark.parametrize("node", ["", "/codebook"])
def test_metadata_of_a_parameter_that_a_stopped_build_left_damaged_are_never_vouched_for(written, node):
    key = f"teachers/a/{written.teacher_document.parameters_group}{node}/zarr.json"
    written.store.objects.replace(key, b'{"zarr_format": 3}')
    codebook = {"codebook": np.linspace(0, 9, 254, dtype=np.float32)}
    with pytest.raises(CorruptCacheError, match=f"{key}: the metadata that stand there are not"):
        written.store.publish_teacher(make_teacher_document(), codebook)


def test_a_missing_parameter_is_corrupt_with_a_remedy(written):
    written.store.objects.delete(parameter_key(written))
    with pytest.raises(
        CorruptCacheError, match=r"the file is missing.*`kdcache repair JOB`.*where teacher 'a' must be fitted again"
    ):
        written.store.parameters(written.teacher_document)


def test_a_parameter_of_another_fit_is_corrupt(written):
    other = written.store.publish_teacher(make_teacher_document("b"), {"codebook": np.zeros(254, np.float32)})
    swapped = written.store.objects.read(f"teachers/b/{other.parameters_group}/codebook/c/0")
    written.store.objects.replace(parameter_key(written), swapped)
    with pytest.raises(CorruptCacheError, match="has not the digest that the teacher's document names"):
        written.store.parameters(written.teacher_document)


def test_a_document_of_another_teacher_is_named(written):
    data = written.store.objects.read("teachers/a/zarr.json")
    written.store.objects.publish("teachers/b/zarr.json", data)
    with pytest.raises(DocumentError, match="names teacher 'a' in the group of 'b'"):
        written.store.teacher("b")


# Shards


def test_a_published_shard_says_its_size_and_digest(written):
    published = written.store.publish_shard(
        written.teacher_document, written.cache_document, 0, written.rows_of_shard(0)
    )
    data = written.store.shard_bytes("a", 0)
    assert published.num_bytes == len(data)
    assert not published.created


def test_the_first_shard_stands_and_the_second_is_told_its_digest(started):
    cache_document = started.cache_document()
    document = started.publish_teacher(make_teacher_document(), {})
    first = started.publish_shard(document, cache_document, 0, np.zeros((128, 11), np.uint8))
    second = started.publish_shard(document, cache_document, 0, np.ones((128, 11), np.uint8))
    assert (first.created, second.created) == (True, False)
    assert second.sha256 == first.sha256
    assert (started.codes_reader(document, cache_document).read_shard(0) == 0).all()


def test_a_damaged_shard_that_stands_is_never_vouched_for(written):
    data = bytearray(written.store.shard_bytes("a", 0))
    data[50] ^= 1
    written.store.objects.replace("teachers/a/codes/c/0/0", bytes(data))
    with pytest.raises(CorruptCacheError, match="checksum of a chunk"):
        written.store.publish_shard(written.teacher_document, written.cache_document, 0, written.rows_of_shard(0))


@pytest.mark.parametrize(("shard_index", "num_rows"), [(0, 127), (2, 128), (3, 128), (-1, 128)])
def test_codes_that_are_not_the_rows_of_the_shard_are_refused(started, shard_index, num_rows):
    document = started.publish_teacher(make_teacher_document(), {})
    with pytest.raises(ShapeError, match="nothing was written"):
        started.publish_shard(document, started.cache_document(), shard_index, np.zeros((num_rows, 11), np.uint8))


def test_codes_with_the_fill_code_are_refused(started):
    document = started.publish_teacher(make_teacher_document(), {})
    codes = np.zeros((128, 11), np.uint8)
    codes[5, 5] = 255
    with pytest.raises(CodecError, match=r"hold the fill code 255.*nothing was written"):
        started.publish_shard(document, started.cache_document(), 0, codes)


def test_bytes_of_a_missing_shard_are_an_error(started):
    with pytest.raises(CorruptCacheError, match="teachers/a/codes/c/0/0: the file is missing"):
        started.shard_bytes("a", 0)


def test_views_are_blocks_of_their_own(tmp_path):
    from kdcache.documents import View

    store = CacheStore.at(tmp_path / "views")
    cache_document = make_cache_document(num_views=2, view=View.make(name="crop-1", seed=0))
    store.write_root(cache_document)
    document = store.publish_teacher(make_teacher_document(), {})
    for shard_index in range(6):
        rows = cache_document.rows_in_shard(shard_index)
        store.publish_shard(document, cache_document, shard_index, np.full((rows, 11), shard_index, np.uint8))
    reader = store.codes_reader(document, cache_document)
    rows = np.array([0, 299, 384, 384 + 299])
    assert reader.read_rows(rows)[:, 0].tolist() == [0, 2, 3, 5]


# Array metadata


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("shape",), [10**15, 11], r"shape\[0\]: expected 384, found 1000000000000000"),
        (("data_type",), "float32", "data_type: expected uint8, found float32"),
        (("codecs",), [], "codecs: expected"),
        (("fill_value",), 0, "fill_value: expected 255, found 0"),
    ],
)
def test_an_array_that_contradicts_the_documents_is_refused_before_it_is_read(written, path, value, told):
    key = "teachers/a/codes/zarr.json"
    metadata = json.loads(written.store.objects.read(key))
    metadata[path[0]] = value
    written.store.objects.replace(key, json.dumps(metadata).encode())
    with pytest.raises(CorruptCacheError, match=told):
        written.reader()


def test_documents_that_ask_for_a_larger_chunk_than_any_may_be_are_refused(written):
    huge = make_cache_document(shard_rows=2**26, chunk_rows=2**26)
    with pytest.raises(CorruptCacheError, match=r"a chunk of 67108864 rows .* above the 268435456 that one may take"):
        written.store.teacher_of("a", huge)


def test_an_array_without_metadata_is_corrupt(written):
    written.store.objects.delete("teachers/a/codes/zarr.json")
    with pytest.raises(CorruptCacheError, match=r"codes/zarr\.json: the file is missing"):
        written.reader()


def test_a_shard_of_another_shape_is_corrupt(written):
    other = encode_shard(np.zeros((128, 11), np.uint8), written.reader().spec.__class__(128, 16, 11, "uint8", 255))
    written.store.objects.replace("teachers/a/codes/c/0/0", other)
    with pytest.raises(CorruptCacheError):
        written.reader().read_shard(0)


# Records


def test_a_record_reads_back(started):
    assert started.publish_record(make_record())
    assert started.record("a", 0) == make_record()


def test_a_record_is_written_once(started):
    started.publish_record(make_record())
    assert not started.publish_record(make_record())


def test_a_shard_without_a_record_is_not_done(started):
    assert started.record("a", 0) is None


def test_records_come_by_number(started):
    for shard_index in (10, 2, 0):
        started.publish_record(make_record(shard_index))
    assert list(started.records("a")) == [0, 2, 10]


def test_records_are_those_of_one_teacher(started):
    started.publish_record(make_record(0, "b"))
    assert started.records("a") == {}


def test_a_record_in_the_wrong_place_is_named(started):
    started.objects.publish("commits/a/1.json", make_record(0).to_json())
    with pytest.raises(DocumentError, match=r"commits/a/1\.json(.|\n)*is the record of 'a' shard 0"):
        started.record("a", 1)


def test_a_torn_record_is_named(started):
    started.objects.publish("commits/a/1.json", make_record(1).to_json()[:-40])
    with pytest.raises(DocumentError, match=r"commits/a/1\.json is no valid record document"):
        started.records("a")


def test_a_stale_partial_record_is_no_record(started, tmp_path):
    started.publish_record(make_record(0))
    (tmp_path / "cache/commits/a/.1.json.99-aa.partial").write_bytes(b"{")
    assert list(started.records("a")) == [0]


# Completion


def test_a_cache_is_not_complete_at_first(started):
    assert started.complete() is None


def test_completion_reads_back_and_can_be_replaced(started):
    started.replace_complete(make_complete())
    started.replace_complete(make_complete(plan_index=1))
    assert started.complete() == make_complete(plan_index=1)


def test_consolidating_keeps_the_cache_document(written):
    before = written.store.cache_document()
    written.store.consolidate()
    assert written.store.cache_document() == before


def test_consolidating_twice_gives_the_same_bytes(written):
    written.store.consolidate()
    before = written.store.objects.read("zarr.json")
    written.store.consolidate()
    assert written.store.objects.read("zarr.json") == before


def test_writing_the_root_after_consolidating_keeps_it_consolidated(written):
    written.store.consolidate()
    before = written.store.objects.read("zarr.json")
    written.store.write_root(written.cache_document)
    assert written.store.objects.read("zarr.json") == before


def test_consolidating_without_a_root_is_an_error(store):
    with pytest.raises(CorruptCacheError, match=r"zarr\.json: the root group is missing"):
        store.consolidate()


def test_stale_partial_files_of_a_cache_are_removed(started, tmp_path):
    path = tmp_path / "cache/index/.0.00000000-1-0123456789abcdef.partial"
    path.write_bytes(b"x")
    os.utime(path, (0, 0))
    assert started.remove_stale_partials() == 1
    assert not path.exists()


def test_a_store_without_partial_files_has_none_to_remove():
    assert CacheStore(object()).remove_stale_partials() == 0


def test_the_size_of_a_shard_is_its_own_and_not_that_of_a_file_beside_it(tmp_path):
    build_tiny(tmp_path / "cache")
    store = CacheStore.at(tmp_path / "cache")
    before = store.shard_sizes("a")
    shard = tmp_path / "cache/teachers/a/codes/c/2/0"
    shard.with_name("0.orig").write_bytes(b"mine")
    assert store.shard_sizes("a") == before
    shard.rename(shard.with_name("0.bak"))
    assert sorted(store.shard_sizes("a")) == [0, 1]
