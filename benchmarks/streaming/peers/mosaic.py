"""MosaicML streaming: MDS shards of 64 MB with a column for each array, its dataset in a DataLoader, its shuffle."""

from __future__ import annotations

__all__ = ["MOSAIC"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet


def _write(row_set: RowSet, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {name: f"ndarray:{column.dtype}:{column.width}" for name, column in row_set.columns.items()}
    arrays = row_set.arrays
    with MDSWriter(out=str(folder), columns={"row": "int", **columns}, size_limit=64 * 2**20) as writer:
        for row in range(row_set.num_rows):
            writer.write({"row": row, **{name: array[row] for name, array in arrays.items()}})


def _open(stored: Stored) -> Epoch:
    # user's code
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(stored.folder), shuffle=True, batch_size=stored.batch_size)
    loader = DataLoader(dataset, batch_size=stored.batch_size, num_workers=stored.num_workers)

    def epoch(_: int) -> Iterator[Batch]:
        for batch in loader:
            yield batch["row"], tuple(batch[name] for name in stored.columns)

    # end of it
    return epoch


def _contestant(name: str, **options: Any) -> Contestant:
    return Contestant(name, "package", _open, "mds", ("benchmarks.streaming.peers.mosaic_import",), _write, **options)


MOSAIC: Final = (_contestant("mosaicml-streaming"), _contestant("mosaicml-streaming, 2 workers", num_workers=2))
"""Contestants."""
