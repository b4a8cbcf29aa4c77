import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from store_builders import make_cache_document

from kdcache.errors import CorruptCacheError, OptionError, ShapeError
from kdcache.store import CacheStore, ExampleTable
from kdcache.store.parquet import ExampleColumns, RangedFile, arrow_schema_for
from kdcache.store.place import Place

NUM_EXAMPLES = 200_000  # four row groups
PLACE = Place("CACHE", "examples.parquet", "Build again.")
KEY = "examples.parquet"


@pytest.fixture(scope="module")
def table():
    digests = np.random.default_rng(0).integers(0, 256, (NUM_EXAMPLES, 16)).astype(np.uint8)
    ids = [f"image-{index}" for index in range(NUM_EXAMPLES)]
    return ExampleTable.make(ids, labels=np.arange(NUM_EXAMPLES) % 7, input_digests=digests)


@pytest.fixture(scope="module")
def data(table):
    return table.to_parquet()


@pytest.fixture
def store(tmp_path, data):
    store = CacheStore.at(tmp_path / "cache")
    store.write_root(make_cache_document(num_examples=NUM_EXAMPLES, num_rows=NUM_EXAMPLES, has_input_digests=True))
    store.objects.publish(KEY, data)
    return store


@pytest.fixture
def ranges(store, monkeypatch):
    """The bytes of every range that is read; whole reads of the table fail."""
    kind = type(store.objects)
    noted = []
    read, read_range = kind.read, kind.read_range

    def note(self, key, start, length):
        data = read_range(self, key, start, length)
        noted.append(len(data))
        return data

    monkeypatch.setattr(kind, "read_range", note)

    def read_others(self, key, **limits):
        return pytest.fail("read whole") if key == KEY else read(self, key, **limits)

    monkeypatch.setattr(kind, "read", read_others)
    return noted


WANTED = np.array([NUM_EXAMPLES - 1, 0, 65_535, 65_536, 3, 3])


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("example_id", "example_ids"),
        ("first_row", "first_row"),
        ("num_rows", "num_rows"),
        ("label", "labels"),
        ("input_digest", "input_digests"),
    ],
)
def test_values_come_in_the_order_of_the_indexes(store, table, name, attribute):
    column = getattr(table, attribute)
    values = store.example_values(name, WANTED)
    np.testing.assert_array_equal(values, column[WANTED])
    assert values.dtype == column.dtype


@pytest.mark.parametrize("indices", [[5, 1], (5, 1), torch.tensor([5, 1]), np.array([5, 1], np.uint8)])
def test_indexes_of_any_kind_are_taken(store, table, indices):
    np.testing.assert_array_equal(store.example_values("input_digest", indices), table.input_digests[[5, 1]])


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [("input_digest", (0, 16), np.uint8), ("label", (0,), np.int64), ("example_id", (0,), object)],
)
def test_no_indexes_give_no_values(store, name, shape, dtype):
    values = store.example_values(name, [])
    assert (values.shape, values.dtype) == (shape, dtype)


def test_values_of_a_few_examples_read_their_row_groups_alone(store, data, ranges):
    store.example_values("input_digest", np.arange(256) + 70_000)
    assert sum(ranges) < len(data) / 2


def test_row_groups_read_again_come_from_memory(store, ranges):
    store.example_values("input_digest", np.arange(256))
    before = len(ranges)
    store.example_values("input_digest", np.arange(256) + 1000)
    assert len(ranges) == before


def test_row_groups_are_kept_in_bounded_memory(data, monkeypatch):
    monkeypatch.setattr("kdcache.store.parquet.KEPT_BYTES", 2 * 65_536 * 16)
    columns = ExampleColumns(lambda: io.BytesIO(data), place=PLACE)
    columns.values("input_digest", np.arange(NUM_EXAMPLES))
    assert 0 < columns._recent.num_bytes <= 2 * 65_536 * 16


def test_a_column_reads_its_own_bytes_alone(store, data, ranges):
    store.example_column("label")
    assert sum(ranges) < len(data) / 4


@pytest.mark.parametrize("name", ["example_id", "first_row", "num_rows", "label", "input_digest"])
def test_columns_and_values_can_be_written_to(store, name):
    assert store.example_column(name).flags.writeable
    assert store.example_values(name, [0]).flags.writeable


def test_values_written_to_do_not_change_those_read_next(store, table):
    store.example_values("input_digest", [0])[:] = 0
    np.testing.assert_array_equal(store.example_values("input_digest", [0]), table.input_digests[:1])


def test_labels_become_a_tensor_without_a_warning(store):
    assert torch.as_tensor(store.example_column("label")).shape == (NUM_EXAMPLES,)


def test_values_of_a_column_that_is_null_throughout_are_none():
    data = ExampleTable.make([1, 2]).to_parquet()
    assert ExampleColumns(lambda: io.BytesIO(data), place=PLACE).values("label", [0, 1]) is None


@pytest.mark.parametrize("index", [-1, NUM_EXAMPLES, 2**62])
def test_an_example_outside_the_table_is_refused(store, index):
    with pytest.raises(ShapeError, match=f"example {index} is outside the table's examples 0 to 199999"):
        store.example_values("label", [0, index])


@pytest.mark.parametrize("indices", [[0.5], [True], [[0]], 0])
def test_indexes_that_are_no_integers_are_refused(store, indices):
    with pytest.raises(ShapeError, match="one axis of integers"):
        store.example_values("label", indices)


@pytest.mark.parametrize("read", ["example_column", "example_values"])
def test_a_column_that_does_not_exist_is_refused_with_those_that_do(store, read):
    arguments = {"example_column": ("lable",), "example_values": ("lable", [0])}[read]
    with pytest.raises(OptionError, match=r"no column 'lable'; its columns are example_id, .*, label, input_digest"):
        getattr(store, read)(*arguments)


READS = {
    "column": lambda store: store.example_column("input_digest"),
    "values": lambda store: store.example_values("input_digest", np.arange(0, NUM_EXAMPLES, 1000)),
}


@pytest.fixture(params=READS)
def read(request):
    return READS[request.param]


def test_a_missing_table_is_corrupt(store, read):
    store.objects.delete(KEY)
    with pytest.raises(CorruptCacheError, match=r"examples\.parquet: the file is missing\. Nothing was changed"):
        read(store)


def test_a_table_deleted_between_two_reads_is_corrupt(store):
    store.example_values("input_digest", [0])
    store.objects.delete(KEY)
    with pytest.raises(CorruptCacheError, match=r"examples\.parquet: the file is missing\. Nothing was changed"):
        store.example_values("input_digest", [NUM_EXAMPLES - 1])


def test_a_table_deleted_under_an_open_file_is_corrupt(store):
    file = RangedFile(store.objects, PLACE)
    store.objects.delete(KEY)
    with pytest.raises(CorruptCacheError, match=r"examples\.parquet: the file is missing"):
        file.read(10)


def digest_byte(data):
    """A byte in the middle of the second row group's digests."""
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(4)
    return chunk.data_page_offset + chunk.total_compressed_size // 2


def test_a_flipped_bit_is_corrupt(store, data, read):
    altered = bytearray(data)
    altered[digest_byte(data)] ^= 1
    store.objects.replace(KEY, bytes(altered))
    with pytest.raises(CorruptCacheError, match=r"examples\.parquet: the file cannot be read"):
        read(store)


@pytest.mark.parametrize("kept", [0, 100, 1_000_000])
def test_a_torn_table_is_corrupt(store, data, read, kept):
    store.objects.replace(KEY, data[:kept])
    with pytest.raises(CorruptCacheError, match=r"examples\.parquet: the file cannot be read"):
        read(store)


def test_a_table_of_another_number_of_examples_is_corrupt(store, read):
    store.objects.replace(KEY, ExampleTable.make([1, 2]).to_parquet())
    with pytest.raises(CorruptCacheError, match="says to hold 2 examples, the cache document says 200000"):
        read(store)


def test_a_column_that_is_null_in_one_row_group_alone_is_corrupt():
    columns = [pa.array(values) for values in ([1, 2], [0, 1])]
    columns += [pa.array([1, 1], pa.int32()), pa.array([3, None], pa.int64()), pa.nulls(2, pa.binary(16))]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=arrow_schema_for("int64")), sink, row_group_size=1)
    file = ExampleColumns(lambda: io.BytesIO(sink.getvalue()), place=PLACE)
    with pytest.raises(CorruptCacheError, match="1 of 2 values of label are missing"):
        file.values("label", [0, 1])


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [(0, 3, b"abc"), (2, -1, b"cdef"), (4, 2**60, b"ef"), (9, 1, b""), (0, None, b"abcdef")],
)
def test_a_ranged_file_reads_as_a_file_does(tmp_path, start, size, expected):
    objects = CacheStore.at(tmp_path).objects
    objects.publish(KEY, b"abcdef")
    file = RangedFile(objects, PLACE)
    assert file.seek(start) == start
    assert file.read(size) == expected
    assert file.tell() == start + len(expected)


@pytest.mark.parametrize(("offset", "whence", "position"), [(-2, 2, 4), (1, 1, 4), (1, 0, 1)])
def test_a_ranged_file_seeks_as_a_file_does(tmp_path, offset, whence, position):
    objects = CacheStore.at(tmp_path).objects
    objects.publish(KEY, b"abcdef")
    file = RangedFile(objects, PLACE)
    file.seek(3)
    assert file.seek(offset, whence) == position
