"""LitData: samples of tensors in binary chunks of 64 MB, its streaming dataset and loader, its shuffle.

Items are decoded one by one: by default each shuffled item would decode the block of items around it.
"""

from __future__ import annotations

__all__ = ["LITDATA"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet


def _write(row_set: RowSet, folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    arrays = {name: torch.from_numpy(array) for name, array in row_set.arrays.items()}
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for row in range(row_set.num_rows):
        writer[row] = {"row": row, **{name: array[row] for name, array in arrays.items()}}
    writer.done()
    writer.merge()


def _open(stored: Stored) -> Epoch:
    # user's code
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(stored.folder), shuffle=True, drop_last=False, batch_decode=0)
    loader = StreamingDataLoader(
        dataset, batch_size=stored.batch_size, num_workers=stored.num_workers, shuffle=True, drop_last=False
    )

    def epoch(_: int) -> Iterator[Batch]:
        for batch in loader:
            yield batch["row"], tuple(batch[name] for name in stored.columns)

    # end of it
    return epoch


def _contestant(name: str, **options: Any) -> Contestant:
    return Contestant(name, "package", _open, "litdata", ("litdata",), _write, **options)


LITDATA: Final = (_contestant("litdata"), _contestant("litdata, 2 workers", num_workers=2))
"""Contestants."""
