"""Which rows of a batch are meant: by a number, a slice, a list or a mask."""

from __future__ import annotations

__all__ = ["RowIndex", "row_positions", "rows_of_examples", "select_rows"]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.errors import ShapeError

RowIndex = int | slice | Sequence[int] | Sequence[bool] | npt.NDArray[np.integer] | npt.NDArray[np.bool_] | Tensor
"""What selects rows of a batch."""


def row_positions(index: object, num_rows: int) -> Tensor:
    """Turn whatever selects rows, but a slice, into row numbers from 0: int64 [index]."""
    given = _index_tensor(index)
    if given.dtype == torch.bool:
        if given.shape != (num_rows,):
            raise ShapeError(f"A mask of {num_rows} rows must have the shape ({num_rows},), got {tuple(given.shape)}.")
        return given.nonzero()[:, 0]
    given = given.to(torch.int64)
    if given.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a check would wait for the device
        _check_range(given, num_rows)
    return torch.where(given < 0, given + num_rows, given)


def _index_tensor(index: object) -> Tensor:
    try:
        given = index if isinstance(index, Tensor) else torch.from_numpy(np.array(index))
    except (TypeError, ValueError) as error:
        raise ShapeError(_no_index(index)) from error
    if given.numel() == 0 and given.dtype != torch.bool and given.ndim == 1:
        return given.to(torch.int64)  # an empty list has a floating-point type
    is_number = given.ndim == 0 and given.dtype != torch.bool
    if given.is_floating_point() or given.is_complex() or not (is_number or given.ndim == 1):
        raise ShapeError(_no_index(index))
    return given.reshape(1) if is_number else given


def _no_index(index: object) -> str:
    return (
        "Rows are selected by an integer, a slice, a one-dimensional sequence of integers, or a mask of bool; "
        f"got {index!r}."
    )


def _check_range(positions: Tensor, num_rows: int) -> None:
    outside = positions[(positions < -num_rows) | (positions >= num_rows)]
    if len(outside):
        raise ShapeError(f"There is no row {int(outside[0])}: the batch has {num_rows} rows.")


def rows_of_examples(first_row: npt.NDArray[np.int64], num_rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Give the row numbers of examples, int64 [row], one example's after the other's.

    Examples
    --------
    >>> rows_of_examples(np.array([10, 4]), np.array([1, 3], np.int32))
    array([10,  4,  5,  6])
    """
    if int(num_rows.max(initial=1)) == 1:
        return first_row
    ends = np.cumsum(num_rows, dtype=np.int64)
    return np.repeat(first_row - (ends - num_rows), num_rows) + np.arange(ends[-1])


def select_rows(values: Tensor, positions: slice | Tensor) -> Tensor:
    """Select rows of any stored type."""
    if isinstance(positions, slice):
        return values[positions]
    if values.dtype == torch.uint16:  # not every device selects uint16
        return values.view(torch.int16).index_select(0, positions).view(torch.uint16)
    return values.index_select(0, positions)
