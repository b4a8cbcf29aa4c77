"""The check that comes before any timing: every row once, and each with its own content."""

from __future__ import annotations

__all__ = ["WrongRowsError", "check_epoch", "row_hashes"]

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.streaming.contestant import Batch, plain

_BLOCK_ROWS: Final = 4096


class WrongRowsError(Exception):
    """A contestant gave rows that are not those it was asked for."""


def row_hashes(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    """Hash each row's bytes over all columns: uint64 [row], sums of bytes times odd random weights, modulo 2^64."""
    hashes = np.zeros(len(columns[0]), np.uint64)
    for place, column in enumerate(columns):
        for start in range(0, len(column), _BLOCK_ROWS):
            block = np.ascontiguousarray(column[start : start + _BLOCK_ROWS])
            values = block.view(np.dtype(f"u{block.dtype.itemsize}")).astype(np.uint64)
            generator = np.random.Generator(np.random.Philox(place))
            weights = generator.integers(0, 2**63, values.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            hashes[start : start + _BLOCK_ROWS] += values @ weights
    return hashes


def check_epoch(batches: Iterable[Batch], columns: Sequence[npt.NDArray[Any]]) -> int:
    """Read an epoch and hold every row against the true columns, joined by its number.

    Parameters
    ----------
    batches : iterable of (indices, columns)
    columns : sequence of ndarray [row, width]
        The truth, in row order.

    Returns
    -------
    int
        Rows that came in the same place as in storage: a shuffle has few.

    Raises
    ------
    WrongRowsError
        A row is missing, comes twice, or has another content, dtype or width.
    """
    true_hashes = row_hashes(columns)
    seen: list[npt.NDArray[np.int64]] = []
    for indices, found in batches:
        rows = plain(indices).astype(np.int64)
        arrays = [plain(column) for column in found]
        _check_kinds(arrays, columns)
        wrong = np.flatnonzero(row_hashes(arrays) != true_hashes[rows])
        if len(wrong):
            raise WrongRowsError(f"row {rows[wrong[0]]} has another content, and {len(wrong)} of {len(rows)} in all")
        seen.append(rows)
    order = np.concatenate(seen) if seen else np.empty(0, np.int64)
    counts = np.bincount(order, minlength=len(true_hashes))
    if (counts != 1).any():
        missing, repeated = int((counts == 0).sum()), int((counts > 1).sum())
        raise WrongRowsError(f"{missing} of {len(true_hashes)} rows are missing, and {repeated} come more than once")
    return int((order == np.arange(len(order))).sum())


def _check_kinds(found: Sequence[npt.NDArray[Any]], columns: Sequence[npt.NDArray[Any]]) -> None:
    kinds, true_kinds = _kinds(found), _kinds(columns)
    if kinds != true_kinds:
        raise WrongRowsError(f"columns are {kinds} where {true_kinds} were stored")


def _kinds(columns: Sequence[npt.NDArray[Any]]) -> list[tuple[str, tuple[int, ...]]]:
    """Name dtypes and widths; uint16 counts as int16, which is how torch gathers it."""
    names = [column.dtype.newbyteorder("=").name for column in columns]
    return [
        ("int16" if name == "uint16" else name, column.shape[1:]) for name, column in zip(names, columns, strict=True)
    ]
