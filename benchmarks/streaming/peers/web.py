"""WebDataset: tar shards with one file an array and row, shards shuffled, and a buffer of 5,000 samples."""

from __future__ import annotations

__all__ = ["WEBDATASET"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet

_SHARD_ROWS: Final = 10_000
_BUFFER_ROWS: Final = 5_000


def _write(row_set: RowSet, folder: Path) -> None:
    import webdataset

    arrays = row_set.arrays
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=_SHARD_ROWS, verbose=0) as writer:
        for row in range(row_set.num_rows):
            files = {f"{name}.npy": np.ascontiguousarray(array[row]) for name, array in arrays.items()}
            writer.write({"__key__": f"{row:09d}", **files})


def _open(stored: Stored) -> Epoch:
    # user's code
    import webdataset

    urls = sorted(str(path) for path in stored.folder.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(_BUFFER_ROWS).decode()
    names = [f"{name}.npy" for name in stored.columns]
    batches = dataset.to_tuple("__key__", *names).batched(stored.batch_size, partial=True)
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=stored.num_workers)

    def epoch(_: int) -> Iterator[Batch]:
        for keys, *columns in loader:
            rows = torch.tensor([int(key) for key in keys])
            yield rows, tuple(torch.as_tensor(np.asarray(column)) for column in columns)

    # end of it
    return epoch


def _contestant(name: str, **options: Any) -> Contestant:
    return Contestant(name, "package", _open, "webdataset", ("webdataset",), _write, **options)


WEBDATASET: Final = (_contestant("webdataset"), _contestant("webdataset, 2 workers", num_workers=2))
"""Contestants."""
