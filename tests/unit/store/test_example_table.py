import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdcache.errors import CorruptCacheError, TransferSetError
from kdcache.store import ExampleTable
from kdcache.store.parquet import ExampleColumns, arrow_schema_document, arrow_schema_for
from kdcache.store.place import Place

PLACE = Place("CACHE", "examples.parquet", "Build again.")
SCHEMA = pathlib.Path(__file__).parents[3] / "schemas" / "examples.arrow.json"


def make_table(num_examples=10, **changes):
    columns = {
        "example_ids": np.arange(num_examples) * 7,
        "num_rows": np.arange(num_examples) % 3 + 1,
        "labels": np.arange(num_examples) % 4,
        "input_digests": np.random.default_rng(0).integers(0, 256, (num_examples, 16)).astype(np.uint8),
    }
    return ExampleTable.make(**{**columns, **changes})


def columns_of(table):
    return ExampleColumns(lambda: io.BytesIO(table.to_parquet()), place=PLACE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"example_ids": [f"é{index}" for index in range(10)]},
        {"labels": None},
        {"input_digests": None},
        {"labels": None, "input_digests": None, "num_rows": None},
    ],
)
def test_a_table_reads_back_from_parquet(changes):
    table = make_table(**changes)
    assert ExampleTable.from_parquet(table.to_parquet(), place=PLACE).equals(table)


def test_equal_tables_give_equal_bytes():
    assert make_table().to_parquet() == make_table().to_parquet()


def test_first_row_is_the_sum_of_rows_before():
    np.testing.assert_array_equal(make_table(4).first_row, [0, 1, 3, 6])


def test_row_groups_hold_65536_examples():
    data = make_table(70_000).to_parquet()
    file = pq.ParquetFile(pa.BufferReader(data))
    assert [file.metadata.row_group(group).num_rows for group in range(2)] == [65_536, 4_464]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_the_written_columns_are_those_of_the_schema_file(kind):
    table = make_table(example_ids=np.arange(10) if kind == "int64" else [str(index) for index in range(10)])
    written = pq.ParquetFile(pa.BufferReader(table.to_parquet())).schema_arrow
    described = json.loads(SCHEMA.read_text())["columns"]
    found = [(field.name, str(field.type), field.nullable) for field in written]
    pick = {"int64": 0, "string": 1}[kind]
    expected = [
        (column["name"], column["type"][pick] if column["name"] == "example_id" else column["type"], column["nullable"])
        for column in described
    ]
    assert found == expected


def test_the_schema_file_is_the_one_the_code_describes():
    assert json.loads(SCHEMA.read_text()) == arrow_schema_document()


def test_single_columns_read_by_name():
    np.testing.assert_array_equal(columns_of(make_table()).column("label"), np.arange(10) % 4)


def test_a_column_that_is_null_throughout_reads_as_none():
    assert columns_of(make_table(labels=None)).column("label") is None


def test_optional_columns_are_left_out_when_not_wanted():
    table = ExampleTable.from_parquet(make_table().to_parquet(), place=PLACE, columns=["label"])
    assert table.labels is not None
    assert table.input_digests is None


@pytest.mark.parametrize("position", [200, 400, 600])
def test_a_flipped_bit_is_found_out_by_the_page_checksums(position):
    data = bytearray(make_table(1000, example_ids=np.random.default_rng(0).integers(0, 2**62, 1000)).to_parquet())
    data[position] ^= 1
    with pytest.raises(CorruptCacheError, match=r"CACHE/examples\.parquet: the file cannot be read"):
        ExampleTable.from_parquet(bytes(data), place=PLACE)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all"])
def test_a_file_that_is_no_parquet_is_found_out(data):
    with pytest.raises(CorruptCacheError, match="the file cannot be read"):
        ExampleTable.from_parquet(data, place=PLACE)


def test_another_number_of_examples_is_found_out_before_they_are_read():
    with pytest.raises(CorruptCacheError, match="says to hold 10 examples, the cache document says 9"):
        ExampleTable.from_parquet(make_table().to_parquet(), place=PLACE, num_examples=9)


def parquet_of(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_a_file_of_other_columns_is_found_out():
    data = parquet_of(pa.table({"example_id": [1], "first_row": [0], "num_rows": [1]}))
    with pytest.raises(CorruptCacheError, match="columns are not those of format v1"):
        ExampleTable.from_parquet(data, place=PLACE)


def test_labels_of_some_examples_only_are_found_out():
    columns = [pa.array(values) for values in ([1, 2], [0, 1])]
    columns += [pa.array([1, 1], pa.int32()), pa.array([3, None], pa.int64()), pa.nulls(2, pa.binary(16))]
    with pytest.raises(CorruptCacheError, match="1 of 2 values of label are missing"):
        ExampleTable.from_parquet(parquet_of(pa.table(columns, schema=arrow_schema_for("int64"))), place=PLACE)


def test_rows_that_overlap_in_a_file_are_found_out():
    columns = [pa.array(values) for values in ([1, 2], [0, 0])]
    columns += [pa.array([1, 1], pa.int32()), pa.nulls(2, pa.int64()), pa.nulls(2, pa.binary(16))]
    with pytest.raises(CorruptCacheError, match="the examples contradict themselves"):
        ExampleTable.from_parquet(parquet_of(pa.table(columns, schema=arrow_schema_for("int64"))), place=PLACE)


@pytest.mark.parametrize("ids", [np.array(["a", "b"]), ["a", "b"], np.array(["a", "b"], np.dtypes.StringDType())])
def test_strings_of_any_kind_become_objects(ids):
    table = ExampleTable.make(ids)
    assert table.example_ids.dtype == object
    assert table.example_ids.tolist() == ["a", "b"]
    assert table.example_id_type == "string"


@pytest.mark.parametrize("ids", [[1, 2], np.array([1, 2], np.int32), np.array([1, 2], np.uint64), (1, 2), range(1, 3)])
def test_integers_of_any_kind_become_int64(ids):
    table = ExampleTable.make(ids)
    assert table.example_ids.dtype == np.int64
    assert table.example_id_type == "int64"


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([1.0, 2.0], "float"),
        ([True, False], "bool"),
        (np.array([True, False]), "bool"),
        (np.array([1.5]), "float"),
        (["a", 1], "int and str"),
        ([b"a"], "bytes"),
        ([None], "NoneType"),
    ],
)
def test_ids_of_another_type_are_refused_by_name(ids, named):
    with pytest.raises(TransferSetError, match=f"all str or all int64, not {named}"):
        ExampleTable.make(ids)


def test_ids_on_two_axes_are_refused():
    with pytest.raises(TransferSetError, match="one axis, not 2"):
        ExampleTable.make(np.zeros((2, 2), np.int64))


def test_no_examples_are_refused():
    with pytest.raises(TransferSetError, match="at least one example"):
        ExampleTable.make([])


def test_an_example_without_rows_is_refused_by_name():
    with pytest.raises(TransferSetError, match="example 7 has 0 rows"):
        make_table(num_rows=[1, 0, *[1] * 8])


def test_rows_that_leave_a_gap_are_refused():
    table = make_table(2)
    with pytest.raises(TransferSetError, match="rows overlap or gap"):
        ExampleTable(table.example_ids, table.first_row + 1, table.num_rows)


def test_columns_of_different_length_are_refused():
    with pytest.raises(TransferSetError, match=r"labels must be int64 of shape \(10,\), not int64 of shape \(9,\)"):
        make_table(labels=np.zeros(9))


def test_digests_of_another_size_are_refused():
    with pytest.raises(TransferSetError, match=r"input_digests must be uint8 of shape \(10, 16\)"):
        make_table(input_digests=np.zeros((10, 32), np.uint8))


def test_a_string_that_is_no_unicode_is_refused():
    with pytest.raises(TransferSetError, match="cannot be stored"):
        ExampleTable.make(["\ud800"]).to_parquet()


@pytest.mark.parametrize("changes", [{"labels": None}, {"example_ids": np.arange(10)}, {"num_rows": None}])
def test_tables_that_differ_in_a_column_are_not_equal(changes):
    assert not make_table().equals(make_table(**changes))


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ("p7", "a str ('p7')"),
        (b"p7", "a bytes (b'p7')"),
        (7, "a int (7)"),
        (np.int64(7), "a int64 (np.int64(7))"),
        (torch.tensor(7), "a Tensor (tensor(7))"),
        ({1, 2}, "a set ({1, 2})"),
        (None, "a NoneType (None)"),
    ],
)
def test_what_is_no_list_of_ids_is_refused_with_a_way_out(ids, shown):
    with pytest.raises(TransferSetError) as caught:
        ExampleTable.make(ids)
    assert str(caught.value) == (
        f"example ids are a list, a tuple or an array of one axis, not {shown}; for a single example give a list of "
        "one id, [example_id]"
    )


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1, 2]),
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.tensor([1, 2]).expand(1, 2)[0],
        [np.int64(1), np.int8(2)],
        [np.uint64(1), np.int64(2)],
        np.array([1, 2], object),
    ],
)
def test_tensors_and_scalars_of_integers_become_int64(ids):
    example_ids = ExampleTable.make(ids).example_ids
    assert example_ids.dtype == np.int64
    assert example_ids.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16])
def test_tensors_of_another_type_are_refused(dtype):
    with pytest.raises(TransferSetError, match="example ids are all str or all int64, not"):
        ExampleTable.make(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("ids", [[1, 2**63], [np.uint64(2**63)], np.array([2**63], np.uint64)])
def test_an_id_outside_int64_is_refused_with_a_way_out(ids):
    with pytest.raises(
        TransferSetError, match=r"example id 9223372036854775808 lies outside int64.*\[str\(value\) for"
    ):
        ExampleTable.make(ids)
