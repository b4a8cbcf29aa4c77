"""HDF5 through h5py: a contiguous dataset, and a chunked one with LZF; rows of a batch read in ascending order."""

from __future__ import annotations

__all__ = ["H5PY"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet

_CHUNK_ROWS: Final = 64


def _write(row_set: RowSet, folder: Path) -> None:
    import h5py

    with h5py.File(folder / "rows.h5", "w") as file:
        for name, array in row_set.arrays.items():
            file.create_dataset(name, data=array)


def _write_compressed(row_set: RowSet, folder: Path) -> None:
    import h5py

    with h5py.File(folder / "rows.h5", "w") as file:
        for name, array in row_set.arrays.items():
            chunks = (_CHUNK_ROWS, array.shape[1])
            file.create_dataset(name, data=array, chunks=chunks, compression="lzf", shuffle=True)


def _open(stored: Stored) -> Epoch:
    # user's code
    import h5py

    file = h5py.File(stored.folder / "rows.h5")
    columns = [file[name] for name in stored.columns]

    def epoch(number: int) -> Iterator[Batch]:
        order = np.random.default_rng(number).permutation(stored.num_rows)
        for start in range(0, stored.num_rows, stored.batch_size):
            rows = np.sort(order[start : start + stored.batch_size])
            yield rows, tuple(torch.from_numpy(column[rows]) for column in columns)

    # end of it
    return epoch


def _contestant(name: str, write: Any, stored_as: str) -> Contestant:
    return Contestant(name, "package", _open, stored_as, ("h5py",), write)


H5PY: Final = (
    _contestant("h5py", _write, "h5py"),
    _contestant("h5py, chunks of 64 rows with lzf", _write_compressed, "h5py-lzf"),
)
"""Contestants."""
