"""Whatever is stored reads back; whatever is altered is refused, never read as other numbers."""

import io
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kdcache.documents import CacheDocument, Codes, Fingerprint, TeacherDocument
from kdcache.errors import CorruptCacheError, DuplicateExampleError, TransferSetError
from kdcache.store import CacheStore, ExampleTable
from kdcache.store.index import index_arrays
from kdcache.store.parquet import ExampleColumns
from kdcache.store.place import Place
from kdcache.store.shards import ShardSpec, decode_shard, encode_shard

PLACE = Place("CACHE", "teachers/a/codes/c/0/0", "Build again.")
FILLS = {"uint8": 255, "uint16": 65535, "uint64": 2**64 - 1, "float16": math.nan, "float32": math.nan}

specs = st.builds(
    lambda num_chunks, chunk_rows, num_columns, dtype: ShardSpec(
        num_chunks * chunk_rows, chunk_rows, num_columns, dtype, FILLS[dtype]
    ),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(sorted(FILLS)),
)


@st.composite
def specs_and_rows(draw):
    spec = draw(specs)
    num_rows = draw(st.integers(1, spec.shard_rows))
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.sampled_from([0, 1, 30]))
    rows = np.random.default_rng(seed).normal(100, spread, (num_rows, spec.num_columns))
    return spec, rows.astype(spec.dtype)


@given(specs_and_rows())
def test_a_shard_decodes_to_its_rows_and_nothing_else(spec_and_rows):
    spec, rows = spec_and_rows
    decoded = decode_shard(encode_shard(rows, spec), spec, place=PLACE)
    assert decoded[: len(rows)].tobytes() == rows.tobytes()
    assert np.array_equal(
        decoded[len(rows) :], np.full_like(decoded[len(rows) :], spec.fill), equal_nan=rows.dtype.kind == "f"
    )


@given(specs_and_rows(), st.data())
def test_any_flipped_bit_of_a_shard_is_refused(spec_and_rows, data):
    spec, rows = spec_and_rows
    shard = bytearray(encode_shard(rows, spec))
    bit = data.draw(st.integers(0, 8 * len(shard) - 1))
    shard[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptCacheError):
        decode_shard(bytes(shard), spec, place=PLACE)


@given(specs_and_rows(), st.data())
def test_any_burst_of_other_bytes_is_refused(spec_and_rows, data):
    spec, rows = spec_and_rows
    shard = encode_shard(rows, spec)
    start = data.draw(st.integers(0, len(shard) - 1))
    burst = data.draw(st.binary(min_size=1, max_size=min(100, len(shard) - start)))
    altered = shard[:start] + burst + shard[start + len(burst) :]
    assume(altered != shard)
    with pytest.raises(CorruptCacheError):
        decode_shard(altered, spec, place=PLACE)


@given(specs_and_rows(), st.data())
def test_a_shard_cut_anywhere_is_refused(spec_and_rows, data):
    spec, rows = spec_and_rows
    shard = encode_shard(rows, spec)
    with pytest.raises(CorruptCacheError):
        decode_shard(shard[: data.draw(st.integers(0, len(shard) - 1))], spec, place=PLACE)


@given(specs_and_rows(), st.binary(min_size=1, max_size=50))
def test_a_shard_with_more_bytes_is_refused(spec_and_rows, more):
    spec, rows = spec_and_rows
    with pytest.raises(CorruptCacheError):
        decode_shard(encode_shard(rows, spec) + more, spec, place=PLACE)


@given(st.binary(max_size=300), specs)
def test_bytes_of_any_kind_are_refused_as_a_shard(data, spec):
    with pytest.raises(CorruptCacheError):
        decode_shard(data, spec, place=PLACE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    num_rows, generator = 500, np.random.default_rng(0)
    store = CacheStore.at(tmp_path_factory.mktemp("cache"))
    cache_document = CacheDocument.make(
        num_classes=10,
        num_examples=num_rows,
        num_rows=num_rows,
        shard_rows=96,
        chunk_rows=8,
        example_id_type="int64",
        transfer_set_digest="0" * 64,
        has_labels=False,
        has_input_digests=False,
    )
    store.write_root(cache_document)
    member = Fingerprint.make(name="a", source="models:net", weights_sha256="1" * 64)
    document = TeacherDocument.make(
        name="a",
        members=(member,),
        num_classes=10,
        codec=Codes(),
        num_columns=11,
        storage_dtype="uint8",
        parameters={},
        num_pilot_rows=10,
    )
    document = store.publish_teacher(document, {})
    codes = generator.integers(0, 255, (num_rows, 11)).astype(np.uint8)
    for shard_index in range(cache_document.num_shards):
        start = shard_index * 96
        rows = codes[start : start + cache_document.rows_in_shard(shard_index)]
        store.publish_shard(document, cache_document, shard_index, rows)
    return store, cache_document, document, codes


@given(
    npst.arrays(np.int64, st.integers(0, 400), elements=st.integers(0, 499)),
    st.sampled_from([0, 88, 300, 10**6]),
)
def test_any_rows_in_any_order_read_as_they_were_stored(cache, rows, cache_bytes):
    store, cache_document, document, codes = cache
    reader = store.codes_reader(document, cache_document, cache_bytes=cache_bytes)
    np.testing.assert_array_equal(reader.read_rows(rows), codes[rows])
    np.testing.assert_array_equal(reader.read_rows(rows[::-1]), codes[rows[::-1]])


@given(st.data())
def test_rows_of_an_altered_shard_are_right_or_refused(cache, data):
    store, cache_document, document, codes = cache
    key = "teachers/a/codes/c/2/0"
    whole = store.shard_bytes("a", 2)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    altered = bytearray(whole)
    altered[bit // 8] ^= 1 << bit % 8
    rows = data.draw(npst.arrays(np.int64, st.integers(1, 30), elements=st.integers(192, 287)))
    store.objects.replace(key, bytes(altered))
    try:
        np.testing.assert_array_equal(store.codes_reader(document, cache_document).read_rows(rows), codes[rows])
    except CorruptCacheError as error:
        refusal = str(error)
    else:
        refusal = key
    finally:
        store.objects.replace(key, whole)
    assert key in refusal


unique_ids = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60, unique=True),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=60, unique=True),
)


@settings(max_examples=50)
@given(unique_ids, st.data())
def test_any_ids_are_found_at_their_rows(tmp_path_factory, ids, data):
    num_rows = data.draw(st.lists(st.integers(1, 9), min_size=len(ids), max_size=len(ids)))
    table = ExampleTable.make(ids, num_rows=num_rows)
    wanted = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=30))
    store = CacheStore.at(tmp_path_factory.mktemp("cache"))
    store.write_root(
        CacheDocument.make(
            num_classes=10,
            num_examples=len(ids),
            num_rows=sum(num_rows),
            shard_rows=16,
            chunk_rows=8,
            example_id_type=table.example_id_type,
            transfer_set_digest="0" * 64,
            has_labels=False,
            has_input_digests=False,
        )
    )
    store.write_index(table)
    first_row, found_rows = store.lookup([ids[index] for index in wanted])
    np.testing.assert_array_equal(first_row, table.first_row[wanted])
    np.testing.assert_array_equal(found_rows, table.num_rows[wanted])


@given(unique_ids, st.data())
def test_any_repeated_id_is_refused(ids, data):
    repeated = data.draw(st.sampled_from(ids))
    with pytest.raises(DuplicateExampleError, match="1 example ids stand more than once"):
        index_arrays(ExampleTable.make([*ids, repeated]))


@given(unique_ids, st.data())
def test_any_table_reads_back_from_parquet(ids, data):
    labels = data.draw(st.none() | npst.arrays(np.int64, len(ids)))
    digests = data.draw(st.none() | npst.arrays(np.uint8, (len(ids), 16)))
    table = ExampleTable.make(ids, labels=labels, input_digests=digests)
    assert ExampleTable.from_parquet(table.to_parquet(), place=PLACE).equals(table)


@pytest.fixture(scope="module")
def examples():
    digests = np.random.default_rng(0).integers(0, 256, (100, 16)).astype(np.uint8)
    table = ExampleTable.make([f"image-{index}" for index in range(100)], input_digests=digests)
    return table, table.to_parquet()


@given(st.data())
def test_digests_of_an_altered_table_are_right_or_refused(examples, data):
    table, whole = examples
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    altered = bytearray(whole)
    altered[bit // 8] ^= 1 << bit % 8
    wanted = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=30))
    try:
        columns = ExampleColumns(lambda: io.BytesIO(altered), place=PLACE, num_examples=100)
        np.testing.assert_array_equal(columns.values("input_digest", wanted), table.input_digests[wanted])
    except CorruptCacheError as error:
        refusal = str(error)
    else:
        refusal = PLACE.key
    assert PLACE.key in refusal


@given(unique_ids, st.data())
def test_values_are_those_of_the_column_at_the_indexes(ids, data):
    table = ExampleTable.make(ids)
    wanted = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=30))
    columns = ExampleColumns(lambda: io.BytesIO(table.to_parquet()), place=PLACE)
    np.testing.assert_array_equal(columns.values("example_id", wanted), table.example_ids[wanted])


@given(st.one_of(st.integers(), st.text(), st.binary(), st.booleans(), st.floats(), st.none()))
def test_what_is_no_list_is_never_taken_for_ids(value):
    with pytest.raises(TransferSetError, match="give a list of one id"):
        ExampleTable.make(value)
