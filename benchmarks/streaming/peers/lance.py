"""Lance: a dataset with a fixed-size list for each array; the rows of a batch are taken by number."""

from __future__ import annotations

__all__ = ["LANCE"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.peers.huggingface import arrow_table
from benchmarks.streaming.row_sets import RowSet


def _write(row_set: RowSet, folder: Path) -> None:
    import lance

    lance.write_dataset(arrow_table(row_set), str(folder), mode="overwrite")


def _open(stored: Stored) -> Epoch:
    # user's code
    import lance

    dataset = lance.dataset(str(stored.folder))

    def epoch(number: int) -> Iterator[Batch]:
        order = np.random.default_rng(number).permutation(stored.num_rows)
        for start in range(0, stored.num_rows, stored.batch_size):
            rows = order[start : start + stored.batch_size]
            table = dataset.take(rows).combine_chunks()
            columns = []
            for name, (_, width) in stored.columns.items():
                values = table[name].chunk(0).flatten().to_numpy(zero_copy_only=False)
                columns.append(torch.from_numpy(values.reshape(-1, width)))
            yield rows, tuple(columns)

    # end of it
    return epoch


def _contestant(name: str, **options: Any) -> Contestant:
    return Contestant(name, "package", _open, "lance", ("lance", "pyarrow"), _write, **options)


LANCE: Final = (_contestant("Lance"),)
"""Contestants."""
