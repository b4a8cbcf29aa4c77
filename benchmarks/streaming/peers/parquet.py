"""Parquet through pyarrow: windows of row groups in random order, shuffled in memory; binary columns, and lists."""

from __future__ import annotations

__all__ = ["PARQUET"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.peers.huggingface import arrow_table
from benchmarks.streaming.row_sets import RowSet

_GROUP_ROWS: Final = 4096
_WINDOW_GROUPS: Final = 8


def _write_binary(row_set: RowSet, folder: Path) -> None:
    from pyarrow import parquet

    columns = {"row": pa.array(np.arange(row_set.num_rows))}
    for name, array in row_set.arrays.items():
        row_bytes = array.dtype.itemsize * array.shape[1]
        buffer = pa.py_buffer(np.ascontiguousarray(array))
        columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), len(array), [None, buffer])
    parquet.write_table(
        pa.table(columns), folder / "rows.parquet", row_group_size=_GROUP_ROWS, compression="zstd", use_dictionary=False
    )


def _write_lists(row_set: RowSet, folder: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(
        arrow_table(row_set), folder / "rows.parquet", row_group_size=_GROUP_ROWS, compression="zstd",
        use_dictionary=False,
    )  # fmt: skip


def _open_binary(stored: Stored) -> Epoch:
    # user's code
    from pyarrow import parquet

    file = parquet.ParquetFile(stored.folder / "rows.parquet", memory_map=True)

    def epoch(number: int) -> Iterator[Batch]:
        generator = np.random.default_rng(number)
        groups = generator.permutation(file.num_row_groups).tolist()
        for first in range(0, len(groups), _WINDOW_GROUPS):
            table = file.read_row_groups(groups[first : first + _WINDOW_GROUPS]).combine_chunks()
            numbers = torch.from_numpy(table["row"].to_numpy())
            columns = []
            for name, (dtype, width) in stored.columns.items():
                buffer = table[name].chunk(0).buffers()[1]
                values = np.frombuffer(buffer, "int16" if dtype == "uint16" else dtype).reshape(-1, width)
                columns.append(torch.from_numpy(values))
            for places in torch.from_numpy(generator.permutation(len(table))).split(stored.batch_size):
                yield numbers[places], tuple(column.index_select(0, places) for column in columns)

    # end of it
    return epoch


def _open_lists(stored: Stored) -> Epoch:
    # user's code
    from pyarrow import parquet

    file = parquet.ParquetFile(stored.folder / "rows.parquet", memory_map=True)

    def epoch(number: int) -> Iterator[Batch]:
        generator = np.random.default_rng(number)
        groups = generator.permutation(file.num_row_groups).tolist()
        for first in range(0, len(groups), _WINDOW_GROUPS):
            table = file.read_row_groups(groups[first : first + _WINDOW_GROUPS]).combine_chunks()
            numbers = torch.from_numpy(table["row"].to_numpy())
            columns = []
            for name, (dtype, width) in stored.columns.items():
                values = table[name].chunk(0).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
                columns.append(torch.from_numpy(values.view("int16") if dtype == "uint16" else values))
            for places in torch.from_numpy(generator.permutation(len(table))).split(stored.batch_size):
                yield numbers[places], tuple(column.index_select(0, places) for column in columns)

    # end of it
    return epoch


def _contestant(name: str, open_epochs: Any, write: Any, stored_as: str) -> Contestant:
    return Contestant(name, "package", open_epochs, stored_as, ("pyarrow", "pyarrow.parquet"), write)


PARQUET: Final = (
    _contestant("Parquet, fixed-size binary", _open_binary, _write_binary, "parquet-binary"),
    _contestant("Parquet, lists", _open_lists, _write_lists, "parquet-lists"),
)
"""Contestants."""
