import hashlib

import numpy as np
import pytest
import torch
from store_builders import make_cache_document

from kdcache.errors import CorruptCacheError, DuplicateExampleError, TransferSetError, UnknownExampleError
from kdcache.store import CacheStore, ExampleTable
from kdcache.store.arrays import encode_small_array
from kdcache.store.index import CHUNK_ENTRIES, IdIndex, id_keys, index_arrays, index_spec
from kdcache.store.place import Place
from kdcache.store.shards import encode_shard

PLACE = Place("CACHE", "index/entries", "Build again.")
NUM_MANY = 3 * CHUNK_ENTRIES + 100


def write_index(folder, table):
    store = CacheStore.at(folder)
    num_examples = len(table)
    store.write_root(
        make_cache_document(
            num_examples=num_examples,
            num_rows=int(table.num_rows.sum()),
            example_id_type=table.example_id_type,
            has_labels=False,
        )
    )
    store.write_index(table)
    return store


def make_ids(kind, num_examples):
    generator = np.random.default_rng(0)
    if kind == "int64":
        return generator.permutation(np.arange(-num_examples, num_examples, 2)) * 1_000_003
    return [f"n{number:08}/image.jpg" for number in generator.permutation(num_examples)]


@pytest.fixture(params=["int64", "string"])
def many(request, tmp_path):
    ids = make_ids(request.param, NUM_MANY)
    table = ExampleTable.make(ids, num_rows=np.arange(NUM_MANY) % 5 + 1)
    return write_index(tmp_path / "cache", table), table


def test_every_id_is_found_at_its_rows(many):
    store, table = many
    first_row, num_rows = store.lookup(table.example_ids)
    np.testing.assert_array_equal(first_row, table.first_row)
    np.testing.assert_array_equal(num_rows, table.num_rows)
    assert (first_row.dtype, num_rows.dtype) == (np.int64, np.int32)


def test_ids_are_found_in_the_order_given_and_as_often(many):
    store, table = many
    wanted = np.array([2000, 3, 3, NUM_MANY - 1])
    first_row, _ = store.lookup(table.example_ids[wanted].tolist())
    np.testing.assert_array_equal(first_row, table.first_row[wanted])


def test_no_ids_are_found_as_no_rows(many):
    store, _ = many
    first_row, num_rows = store.lookup([])
    assert len(first_row) == len(num_rows) == 0


def test_a_lookup_reads_only_the_chunks_it_needs(many, monkeypatch):
    store, table = many
    store.lookup(table.example_ids[:1])
    kind = type(store.objects)
    noted = []
    read_range = kind.read_range
    monkeypatch.setattr(
        kind,
        "read_range",
        lambda self, key, start, length: noted.append(length) or read_range(self, key, start, length),
    )
    store.lookup(table.example_ids[1:2])
    assert len(noted) <= 1
    assert sum(noted) < store.objects.size("index/entries/c/0/0") / 2


@pytest.mark.parametrize("kind", ["int64", "string"])
@pytest.mark.parametrize("num_examples", [1, CHUNK_ENTRIES, CHUNK_ENTRIES + 1])
def test_an_index_of_any_size_finds_its_ids(tmp_path, kind, num_examples):
    table = ExampleTable.make(make_ids(kind, num_examples))
    store = write_index(tmp_path / "cache", table)
    np.testing.assert_array_equal(store.lookup(table.example_ids)[0], np.arange(num_examples))


def test_the_ends_of_int64_are_ids_like_others(tmp_path):
    ids = [2**63 - 1, -(2**63), 0, -1]
    store = write_index(tmp_path / "cache", ExampleTable.make(ids))
    np.testing.assert_array_equal(store.lookup(ids)[0], [0, 1, 2, 3])


def test_an_id_that_equals_the_padding_of_the_index_is_unknown(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make([1, 2]))
    with pytest.raises(UnknownExampleError):
        store.lookup([-1])


def test_unknown_ids_are_named_and_counted(many):
    store, table = many
    unknown = [7] if table.example_id_type == "int64" else ["seven"]
    with pytest.raises(UnknownExampleError) as caught:
        store.lookup([table.example_ids.tolist()[0], *unknown])
    assert str(caught.value) == (
        f"{store.address}: 1 of 2 example ids are not in this cache: {unknown[0]!r}. "
        f"Its ids are {table.example_id_type}. Check that the cache was built from this transfer set."
    )


def test_of_many_unknown_ids_five_are_named(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make(["a"]))
    with pytest.raises(UnknownExampleError, match=r"9 of 9 .*: '0', '1', '2', '3', '4' and 4 more"):
        store.lookup([str(number) for number in range(9)])


def test_an_id_below_all_others_is_unknown(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make([10, 20]))
    with pytest.raises(UnknownExampleError, match=": 5"):
        store.lookup([5])


def test_strings_for_int64_ids_are_unknown_with_a_hint(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make([1, 2]))
    with pytest.raises(
        UnknownExampleError, match=r"Its ids are int64\. You gave string ids.*\[int\(value\) for value in"
    ):
        store.lookup(["1"])


def test_integers_for_string_ids_are_unknown_with_a_hint(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make(["1", "2"]))
    with pytest.raises(
        UnknownExampleError, match=r"Its ids are string\. You gave int64 ids.*\[str\(value\) for value in"
    ):
        store.lookup([1])


@pytest.mark.parametrize("ids", [[1.0], [True], np.array([1.5]), [b"1"]])
def test_ids_that_are_neither_integers_nor_strings_are_refused(tmp_path, ids):
    store = write_index(tmp_path / "cache", ExampleTable.make([1, 2]))
    with pytest.raises(TransferSetError, match="all str or all int64"):
        store.lookup(ids)


def test_duplicate_ids_are_named_with_their_positions():
    with pytest.raises(DuplicateExampleError, match=r"1 example ids stand more than once.*'b' at 1 and 3"):
        index_arrays(ExampleTable.make(["a", "b", "c", "b"]))


def test_duplicate_integers_are_named_with_their_positions():
    with pytest.raises(DuplicateExampleError, match=r"2 example ids .*: 7 at 0 and 2, 7 at 2 and 4"):
        index_arrays(ExampleTable.make([7, 1, 7, 2, 7]))


def test_of_many_duplicates_five_are_named():
    with pytest.raises(DuplicateExampleError, match=r"20 example ids .*, and 15 more"):
        index_arrays(ExampleTable.make([*range(20), *range(20)]))


def test_nothing_is_written_for_duplicate_ids(tmp_path):
    with pytest.raises(DuplicateExampleError):
        write_index(tmp_path / "cache", ExampleTable.make([1, 1]))
    assert list(CacheStore.at(tmp_path / "cache").objects.list("index")) == ["index/zarr.json"]


def test_a_string_id_is_keyed_by_the_two_halves_of_its_blake2b():
    digest = hashlib.blake2b("é".encode(), digest_size=16).digest()
    key, check = id_keys(np.array(["é"], object))
    assert key.astype("<u8").tobytes() + check.astype("<u8").tobytes() == digest


def test_an_int64_id_is_its_own_key():
    key, check = id_keys(np.array([-1, 5]))
    assert key.tolist() == [2**64 - 1, 5]
    assert check.tolist() == [0, 0]


class OneChunk:
    """Entries that are in memory."""

    def __init__(self, entries):
        self._entries = entries

    def chunks(self, chunk_indexes):
        for chunk_index in chunk_indexes:
            yield chunk_index, self._entries[chunk_index * CHUNK_ENTRIES : (chunk_index + 1) * CHUNK_ENTRIES]


def test_strings_that_share_a_key_are_told_apart_by_the_check(monkeypatch):
    num_examples = 2 * CHUNK_ENTRIES

    def all_alike(ids):
        return np.full(len(ids), 9, np.uint64), np.array([int(value) for value in ids], np.uint64)

    monkeypatch.setattr("kdcache.store.index.id_keys", all_alike)
    table = ExampleTable.make([str(number) for number in range(num_examples)])
    arrays = index_arrays(table)
    index = IdIndex(
        OneChunk(arrays.entries),
        arrays.fences,
        num_examples=num_examples,
        num_rows=num_examples,
        example_id_type="string",
        place=PLACE,
    )
    wanted = [3, CHUNK_ENTRIES - 1, CHUNK_ENTRIES, num_examples - 1]
    np.testing.assert_array_equal(index.lookup([str(number) for number in wanted])[0], wanted)


@pytest.mark.parametrize("key", ["index/fences/c/0/0", "index/entries/c/0/0"])
def test_a_missing_part_of_the_index_is_an_error_with_a_remedy(many, key):
    store, table = many
    store.objects.delete(key)
    with pytest.raises(CorruptCacheError, match=f"{key}: .* missing.*kdcache repair .*: it makes the index anew"):
        store.lookup(table.example_ids[:1])


@pytest.mark.parametrize("key", ["index/fences/c/0/0", "index/entries/c/0/0"])
def test_an_altered_part_of_the_index_is_an_error(many, key):
    store, table = many
    data = bytearray(store.objects.read(key))
    data[20] ^= 1
    store.objects.replace(key, bytes(data))
    with pytest.raises(CorruptCacheError, match="checksum"):
        store.lookup(table.example_ids)


def test_fences_of_another_number_of_examples_are_an_error(many):
    store, table = many
    store.objects.replace("index/fences/c/0/0", store.objects.read("index/fences/c/0/0")[:-8])
    with pytest.raises(CorruptCacheError, match=r"its shape \(4, 3\) takes 100"):
        store.lookup(table.example_ids[:1])


def test_shards_of_the_index_hold_up_to_262144_entries():
    assert index_spec(10**7).shard_rows == 262_144
    assert index_spec(5000).shard_rows == 5120


INDEX_ARRAYS = ["index/fences/c/0/0", "index/entries/c/0/0"]


@pytest.mark.parametrize("key", INDEX_ARRAYS)
def test_a_part_of_the_index_that_a_stopped_build_left_damaged_is_never_vouched_for(many, key):
    store, table = many
    data = bytearray(store.objects.read(key))
    data[20] ^= 1
    store.objects.replace(key, bytes(data))
    with pytest.raises(CorruptCacheError, match=f"{key}: .*checksum.*kdcache repair .*: it makes the index anew"):
        store.write_index(table)


@pytest.mark.parametrize("key", [*INDEX_ARRAYS, "index/fences/zarr.json", "index/entries/zarr.json"])
def test_a_part_of_the_index_that_is_empty_is_never_vouched_for(many, key):
    store, table = many
    store.objects.replace(key, b"")
    with pytest.raises(CorruptCacheError, match=key):
        store.write_index(table)


@pytest.mark.parametrize("key", INDEX_ARRAYS)
def test_a_part_of_another_index_is_never_vouched_for(many, tmp_path, key):
    store, table = many
    others = table.example_ids + (1 if table.example_id_type == "int64" else "x")
    other = write_index(tmp_path / "other", ExampleTable.make(others, num_rows=table.num_rows))
    store.objects.replace(key, other.objects.read(key))
    with pytest.raises(CorruptCacheError, match=f"{key}: .* that stands? there (are|is) not"):
        store.write_index(table)


def test_entries_in_the_padding_of_the_index_are_never_vouched_for(many):
    store, table = many
    entries = np.full((4 * CHUNK_ENTRIES, 4), 2**64 - 1, np.uint64)
    entries[:NUM_MANY] = index_arrays(table).entries
    entries[-1] = 0
    store.objects.replace("index/entries/c/0/0", encode_shard(entries, index_spec(NUM_MANY)))
    with pytest.raises(CorruptCacheError, match="not those that follow from the examples"):
        store.write_index(table)


def test_metadata_of_another_index_are_never_vouched_for(many):
    store, table = many
    store.objects.replace("index/entries/zarr.json", store.objects.read("index/fences/zarr.json"))
    with pytest.raises(CorruptCacheError, match=r"index/entries/zarr\.json: the metadata that stand there are not"):
        store.write_index(table)


def test_writing_the_same_index_again_changes_nothing(many):
    store, table = many
    before = store.index_digest()
    store.write_index(table)
    assert store.index_digest() == before


@pytest.mark.parametrize(
    ("first_row", "num_rows"), [(0, 2**31 - 1), (0, 2**64 - 1), (2**64 - 1, 1), (5, 1), (4, 2), (0, 6), (0, 0)]
)
def test_an_entry_that_points_past_the_rows_of_a_view_is_corrupt(tmp_path, first_row, num_rows):
    store = write_index(tmp_path / "cache", ExampleTable.make([7], num_rows=[5]))
    entries = np.array([[7, 0, first_row, num_rows]], np.uint64)
    store.objects.replace("index/entries/c/0/0", encode_shard(entries, index_spec(1)))
    without_checksums = encode_small_array(np.array([[7, 0]], np.uint64))  # as earlier releases wrote fences
    store.objects.replace("index/fences/c/0/0", without_checksums)
    with pytest.raises(CorruptCacheError) as caught:
        store.lookup([7])
    assert str(caught.value) == (
        f"{store.address}/index/entries: the entry of example 7 says {num_rows} rows from row {first_row}, where a "
        f"view has 5 rows. Nothing was changed. Run `kdcache repair {store.address}`: it makes the index anew from the "
        "examples."
    )


@pytest.mark.parametrize("example_id", ["a", b"a", 7])
def test_a_single_id_is_refused_rather_than_taken_apart(many, example_id):
    store, _ = many
    with pytest.raises(TransferSetError, match=r"give a list of one id, \[example_id\]"):
        store.lookup(example_id)


def test_a_tensor_of_ids_is_looked_up_like_a_list(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make([10, 20, 30]))
    np.testing.assert_array_equal(store.lookup(torch.tensor([30, 10]))[0], [2, 0])


@pytest.mark.parametrize("ids", [[], (), np.array([]), torch.tensor([])])
def test_no_ids_of_any_kind_are_found_as_no_rows(tmp_path, ids):
    store = write_index(tmp_path / "cache", ExampleTable.make([10]))
    assert [len(part) for part in store.lookup(ids)] == [0, 0]


@pytest.mark.parametrize("ids", [[10, 2**63], [-(2**63) - 1, 10], [10, 2**200], np.array([10, 2**64 - 1], np.uint64)])
def test_an_integer_outside_int64_is_unknown(tmp_path, ids):
    store = write_index(tmp_path / "cache", ExampleTable.make([10, 0, -1]))
    with pytest.raises(UnknownExampleError, match=r"1 of 2 example ids are not in this cache: -?\d{19,}"):
        store.lookup(ids)


def test_an_integer_outside_int64_is_counted_with_the_other_unknown_ids(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make([10, 20]))
    with pytest.raises(UnknownExampleError, match=f"2 of 3 example ids are not in this cache: {2**63}, 11"):
        store.lookup([2**63, 10, 11])


def test_an_integer_outside_int64_is_unknown_among_strings(tmp_path):
    store = write_index(tmp_path / "cache", ExampleTable.make(["10"]))
    with pytest.raises(UnknownExampleError, match=r"Its ids are string\. You gave int64 ids"):
        store.lookup([2**63])


def test_entries_of_another_index_are_refused_however_sound(tmp_path, many):
    store, table = many
    other = write_index(tmp_path / "other", ExampleTable.make([f"x{number}" for number in range(len(table))]))
    store.objects.replace("index/entries/c/0/0", other.objects.read("index/entries/c/0/0"))
    with pytest.raises(CorruptCacheError, match=r"index/entries/c/0/0: a chunk is sound, but not the one that"):
        store.lookup(table.example_ids[:1])


def test_the_table_of_another_transfer_set_is_refused(many):
    store, table = many
    data = table.to_parquet(transfer_set_digest="7" * 64)
    store.objects.replace("examples.parquet", data)
    with pytest.raises(CorruptCacheError, match="is the table of another transfer set than the cache document names"):
        store.examples()
