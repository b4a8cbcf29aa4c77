"""Contestants: ways to store rows and to read them shuffled in batches, each as a user of it would write it."""

from __future__ import annotations

__all__ = ["BATCH_SIZE", "Batch", "Contestant", "Epoch", "Stored", "user_lines"]

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from benchmarks.streaming.row_sets import Column, RowSet

BATCH_SIZE: Final = 256
_BEGIN: Final = "# user's code"
_END: Final = "# end of it"

Batch = tuple[Any, tuple[Any, ...]]
"""Numbers of rows, int64 [row], and their columns, each [row, width], in the order of the names."""

Epoch = Callable[[int], Iterator[Batch]]
"""Gives the batches of an epoch by its number."""

Kind = Literal["control", "package", "kdcache"]


@dataclass(frozen=True)
class Stored:
    """What a contestant opens.

    Parameters
    ----------
    folder : Path
        What it wrote; a kdcache for those that read kdcache's own files.
    columns : mapping of str to Column
        What is stored under which name.
    num_rows : int
    num_workers : int
        Of a torch DataLoader, for those that use one.
    batch_size : int
    """

    folder: Path
    columns: Mapping[str, Column]
    num_rows: int
    num_workers: int = 0
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True)
class Contestant:
    """A way to store and to read.

    Parameters
    ----------
    name : str
    kind : {"control", "package", "kdcache"}
        Controls are always shown.
    open_epochs : callable (Stored) -> Epoch
        Its source between two markers is what a user writes.
    write : callable (RowSet, Path), optional
        Stores the rows; absent for those that read what another wrote.
    stored_as : str
        Folder of what it reads; "cache" is kdcache's own.
    modules : tuple of str
        Imported before anything is timed; the first names the package.
    reads : {"rows", "codes"}
        Whether it gives the plain columns, or those of the cache.
    num_workers : int
    note : str
        Shown under the table.
    """

    name: str
    kind: Kind
    open_epochs: Callable[[Stored], Epoch]
    stored_as: str
    modules: tuple[str, ...]
    write: Callable[[RowSet, Path], None] | None = None
    reads: Literal["rows", "codes"] = "rows"
    num_workers: int = 0
    shared: tuple[Callable[..., Any], ...] = ()
    note: str = ""

    def stored(self, row_set: RowSet) -> Stored:
        """Give what it opens of a row set."""
        return Stored(row_set.stored(self.stored_as), row_set.columns, row_set.num_rows, self.num_workers)

    def true_columns(self, row_set: RowSet) -> tuple[npt.NDArray[Any], ...]:
        """Give the columns that it must give, [row, width] in row order."""
        return (row_set.codes,) if self.reads == "codes" else tuple(row_set.arrays.values())


def user_lines(contestant: Contestant) -> int:
    """Count the lines that a user writes to read: between two markers, without blank ones, comments and docstrings.

    Raises
    ------
    ValueError
        The markers are missing.
    """
    return sum(_lines_between_markers(function) for function in (contestant.open_epochs, *contestant.shared))


def _lines_between_markers(function: Callable[..., Any]) -> int:
    lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    if _BEGIN not in lines or _END not in lines:
        raise ValueError(f"{function.__name__}: no lines between {_BEGIN!r} and {_END!r}")
    inside = lines[lines.index(_BEGIN) + 1 : lines.index(_END)]
    return sum(bool(line) and not line.startswith("#") for line in inside)


def plain(values: Any) -> npt.NDArray[Any]:
    """Give a tensor, or anything like an array, as an array."""
    return values.numpy() if isinstance(values, Tensor) else np.asarray(values)
