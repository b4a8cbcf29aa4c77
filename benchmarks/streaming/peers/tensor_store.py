"""TensorStore: a sharded Zarr array, the rows of a batch read together, with a memory for decoded chunks."""

from __future__ import annotations

__all__ = ["TENSORSTORE"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet

_CHUNK_ROWS: Final = 64
_SHARD_ROWS: Final = 8192
_POOL_BYTES: Final = 2**30


def _write(row_set: RowSet, folder: Path) -> None:
    import tensorstore as ts

    for name, array in row_set.arrays.items():
        store = ts.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}},
            create=True, dtype=array.dtype.name, shape=array.shape,
            chunk_layout=ts.ChunkLayout(
                read_chunk_shape=(_CHUNK_ROWS, array.shape[1]), write_chunk_shape=(_SHARD_ROWS, array.shape[1])
            ),
            codec=ts.CodecSpec({"driver": "zarr3", "codecs": [{"name": "zstd", "configuration": {"level": 1}}]}),
        ).result()  # fmt: skip
        store.write(np.ascontiguousarray(array)).result()


def _open(stored: Stored) -> Epoch:
    # user's code
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": _POOL_BYTES}})
    columns = []
    for name in stored.columns:
        place = {"driver": "file", "path": str(stored.folder / name)}
        columns.append(ts.open({"driver": "zarr3", "kvstore": place}, read=True, context=context).result())

    def epoch(number: int) -> Iterator[Batch]:
        order = np.random.default_rng(number).permutation(stored.num_rows)
        for start in range(0, stored.num_rows, stored.batch_size):
            rows = order[start : start + stored.batch_size]
            found = [column[rows].read() for column in columns]
            yield rows, tuple(torch.from_numpy(values.result()) for values in found)

    # end of it
    return epoch


def _contestant(name: str, **options: Any) -> Contestant:
    return Contestant(name, "package", _open, "tensorstore", ("tensorstore",), _write, **options)


TENSORSTORE: Final = (
    _contestant("tensorstore, rows", note="with a memory of 1 GiB, which holds all rows decoded after the first epoch"),
)
"""Contestants."""
