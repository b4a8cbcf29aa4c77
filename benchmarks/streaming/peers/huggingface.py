"""Hugging Face datasets: Arrow files with a fixed-size list for each array, shuffled by a DataLoader.

Batches are taken as Arrow: the format "torch" would make float32 of float16, and int64 of every integer.
"""

from __future__ import annotations

__all__ = ["DATASETS"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet


def _write(row_set: RowSet, folder: Path) -> None:
    from datasets import Dataset

    Dataset(arrow_table(row_set)).save_to_disk(str(folder))


def arrow_table(row_set: RowSet) -> pa.Table:
    """Give the rows as a table: their numbers, and a fixed-size list for each array."""
    columns = {"row": pa.array(np.arange(row_set.num_rows))}
    for name, array in row_set.arrays.items():
        values = pa.array(np.ascontiguousarray(array).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(values, array.shape[1])
    return pa.table(columns)


def _open(stored: Stored) -> Epoch:
    # user's code
    from datasets import load_from_disk
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    dataset = load_from_disk(str(stored.folder)).with_format("arrow")
    sampler = BatchSampler(RandomSampler(dataset), stored.batch_size, drop_last=False)

    def collate(table: pa.Table) -> Batch:
        columns = []
        for name, column in stored.columns.items():
            values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            columns.append(torch.from_numpy(values.reshape(-1, column.width).copy()))
        return torch.from_numpy(table["row"].to_numpy().copy()), tuple(columns)

    loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=stored.num_workers, collate_fn=collate)

    def epoch(_: int) -> Iterator[Batch]:
        yield from loader

    # end of it
    return epoch


def _contestant(name: str, **options: Any) -> Contestant:
    return Contestant(name, "package", _open, "datasets", ("datasets", "torch.utils.data"), _write, **options)


DATASETS: Final = (_contestant("datasets"), _contestant("datasets, 2 workers", num_workers=2))
"""Contestants."""
