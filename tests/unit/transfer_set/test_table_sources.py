from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from kdcache import TransferSet
from kdcache.errors import DuplicateExampleError, TransferSetError

PIXELS = np.arange(30, dtype=np.float32).reshape(10, 3)
TABLE = pa.table({
    "path": [f"image-{index}" for index in range(10)],
    "pixels": pa.FixedSizeListArray.from_arrays(PIXELS.reshape(-1), 3),
    "digit": np.arange(10) % 4,
    "length": np.arange(10) % 3 + 1,
    "text": [f"word {index}" for index in range(10)],
})  # fmt: skip


def write_parquet(folder):
    pq.write_table(TABLE, folder / "t.parquet", row_group_size=3)
    return folder / "t.parquet"


def write_several(folder):
    for part in range(2):
        pq.write_table(TABLE.slice(part * 6, 6), folder / f"part-{part}.parquet", row_group_size=4)
    return [folder / "part-0.parquet", str(folder / "part-1.parquet")]


def write_folder(folder):
    write_several(folder)
    return folder


def write_arrow(folder):
    with pa.OSFile(str(folder / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4)
    return str(folder / "t.arrow")


def write_feather(folder):
    pyarrow.feather.write_feather(TABLE, folder / "t.feather")
    return folder / "t.feather"


WRITERS = [
    write_parquet, write_several, write_folder, write_arrow, write_feather,
    lambda _: TABLE, lambda folder: pads.dataset(write_parquet(folder)),
]  # fmt: skip
NAMES = ["parquet", "several files", "folder", "arrow", "feather", "table in memory", "dataset"]


@pytest.fixture(params=WRITERS, ids=NAMES)
def table(request, tmp_path):
    return request.param(tmp_path)


def from_table(table, **options) -> TransferSet:
    return TransferSet.from_table(table, **{"id_column": "path", "input_columns": "pixels", **options})


def test_ids_and_labels_are_read_from_their_columns(table):
    made = from_table(table, label_column="digit")
    assert (made.example_ids.tolist(), made.labels.tolist()) == (TABLE["path"].to_pylist(), TABLE["digit"].to_pylist())


def test_inputs_are_read_by_position_across_row_groups(table):
    assert torch.equal(from_table(table).read_inputs([9, 0, 4, 3]), torch.from_numpy(PIXELS[[9, 0, 4, 3]]))


def test_every_kind_of_table_makes_the_same_transfer_set(table):
    assert from_table(table, label_column="digit").digest() == from_table(TABLE, label_column="digit").digest()


def test_a_transfer_set_of_a_table_survives_pickling(table):
    again = pickle.loads(pickle.dumps(from_table(table)))  # noqa: S301
    assert torch.equal(again.read_inputs([7, 2]), torch.from_numpy(PIXELS[[7, 2]]))


def test_a_table_and_an_array_make_the_same_transfer_set():
    as_array = TransferSet.from_arrays(PIXELS, example_ids=TABLE["path"].to_pylist())
    assert from_table(TABLE).digest() == as_array.digest()


def test_row_counts_are_read_from_their_column():
    assert from_table(TABLE, num_rows_column="length").num_rows.tolist() == TABLE["length"].to_pylist()


def test_several_columns_give_a_mapping():
    assert from_table(TABLE, input_columns=["text", "digit"]).read_input(6) == {"text": "word 6", "digit": 2}


def test_a_decoder_makes_the_input_of_a_rows_cells():
    made = from_table(TABLE, input_columns=["pixels", "digit"], decode=lambda cells: cells["pixels"] * cells["digit"])
    assert made.read_input(3).tolist() == [27.0, 30.0, 33.0]


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([[1.0, 2.0], [3.0]]),
        pa.array([[1.0, 2.0], [3.0]], pa.large_list(pa.float64())),
        pa.chunked_array([pa.array([[1.0, 2.0]]), pa.array([[3.0]])]),
    ],
    ids=["list", "large list", "chunks"],
)
def test_cells_of_unequal_length_are_arrays(cells):
    made = TransferSet.from_table(pa.table({"id": [1, 2], "x": cells}), id_column="id", input_columns="x")
    assert [made.read_input(index).tolist() for index in range(2)] == [[1.0, 2.0], [3.0]]


def test_cells_of_fixed_size_in_a_slice_are_the_slices_own():
    made = from_table(TABLE.slice(4, 3))
    assert torch.equal(made.read_inputs([0, 2]), torch.from_numpy(PIXELS[[4, 6]]))


def test_tensor_cells_keep_their_shape():
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(2, 2, 3))
    made = TransferSet.from_table(pa.table({"id": [1, 2], "x": tensors}), id_column="id", input_columns="x")
    assert made.read_input(1).tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(TransferSetError, match=r"the table has no column \['picture'\]; it has \['path', 'pixels'"):
        from_table(TABLE, input_columns="picture")


@pytest.mark.parametrize("name", ["missing.parquet", "missing.arrow"])
def test_a_table_that_cannot_be_opened_is_named(tmp_path, name):
    with pytest.raises(TransferSetError, match=rf"{name} cannot be opened"):
        from_table(tmp_path / name)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(TransferSetError, match=r"t\.parquet cannot be opened"):
        from_table(tmp_path / "t.parquet")


def test_duplicate_ids_in_a_table_are_refused():
    with pytest.raises(DuplicateExampleError, match="'image-0' at positions 0 and 10"):
        _ = from_table(pa.concat_tables([TABLE, TABLE.slice(0, 1)])).example_ids


def test_missing_labels_in_a_table_are_refused():
    labels = pa.table({"id": [1, 2], "x": [0.0, 1.0], "y": [None, 3]})
    with pytest.raises(TransferSetError, match=r"they must be int \[example\]"):
        TransferSet.from_table(labels, id_column="id", input_columns="x", label_column="y")
