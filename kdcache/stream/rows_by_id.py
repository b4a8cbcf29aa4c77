"""Rows by id: what a batch's ids are in a cache, found and read whatever order they come in."""

from __future__ import annotations

__all__ = ["FoundRows", "RowsById", "RowsByPosition"]

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdcache.cache import SoftTargetCache
from kdcache.errors import DuplicateExampleError, TransferSetError, UnknownExampleError
from kdcache.row_selection import rows_of_examples
from kdcache.soft_targets import SoftTargets
from kdcache.store.ids import ids_as_given


@dataclass(frozen=True, eq=False)
class FoundRows:
    """Where examples stand in a cache.

    Parameters
    ----------
    ids : ndarray [example] of int64 or object
    first_row : ndarray [example] of int64
    num_rows : ndarray [example] of int32
    """

    ids: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray

    def rows(self) -> np.ndarray:
        """Give all row numbers, int64 [row], one example's after the other's."""
        return rows_of_examples(self.first_row, self.num_rows)


class RowsById:
    """Finds and reads the soft targets of examples by their ids; safe between threads.

    Parameters
    ----------
    cache : SoftTargetCache
    view_index : int
    teachers : sequence of str, optional
        Read only these.
    allow_repeats : bool
        Take a batch in which an id stands twice.
    max_resident_bytes : int
        A cache whose coded rows take no more is held in memory; it fills as rows are asked for.

    Raises
    ------
    ShapeError
        There is no such view.
    UnknownTeacherError
        A teacher is not in the cache.
    """

    def __init__(
        self,
        cache: SoftTargetCache,
        *,
        view_index: int,
        teachers: Sequence[str] | None,
        allow_repeats: bool,
        max_resident_bytes: int,
    ) -> None:
        cache.locate([], view_index=view_index)  # refuses a view that is not there
        self.cache = cache
        self._view_index = view_index
        self._teachers = teachers
        self._allow_repeats = allow_repeats
        self._has_single_rows = cache.document.num_rows == cache.document.num_examples
        if cache.coded_bytes(teachers=teachers) <= max_resident_bytes and cache.complete is not None:
            cache.resident_codes(teachers=teachers)

    def ids(self, values: Any, *, where: str) -> np.ndarray:
        """Take a batch's ids as they are: int64 [example], or an object array of str or int [example].

        Raises
        ------
        DuplicateExampleError
            An id stands twice, and repeats are not allowed.
        TransferSetError
            The ids are no list of texts or integers.
        """
        try:
            ids = ids_as_given(values)
        except TransferSetError as error:
            raise TransferSetError(f"{where}: its ids cannot be read: {error}") from error
        if not self._allow_repeats:
            _refuse_repeats(ids, where)
        return ids

    def find(self, ids: np.ndarray, *, where: str) -> FoundRows:
        """Find examples' rows.

        Raises
        ------
        UnknownExampleError
            An id is not in the cache.
        """
        try:
            return FoundRows(ids, *self.cache.locate(ids, view_index=self._view_index))
        except UnknownExampleError as error:
            raise UnknownExampleError(f"{where}: {error} No batch was given with other rows in their place") from error

    def read(self, found: FoundRows) -> SoftTargets:
        """Read rows, still coded; where examples have several, the soft targets say how many each has."""
        soft_targets = self.cache.read_rows(found.rows(), teachers=self._teachers)
        if self._has_single_rows:
            return soft_targets
        return replace(soft_targets, num_rows=torch.from_numpy(found.num_rows))

    def example_indices(self, found: FoundRows) -> np.ndarray:
        """Give the examples' places in the cache's row order, int64 [example]."""
        in_view: np.ndarray = found.first_row % self.cache.document.padded_rows
        return in_view if self._has_single_rows else np.searchsorted(self.cache.first_rows, in_view)


class RowsByPosition:
    """The rows of the examples at positions of a dataset: looked up once, when they are first asked for.

    Looking ids up costs more than reading rows that are in memory, and an example comes again in every epoch.

    Parameters
    ----------
    rows : RowsById
    ids : ndarray [example] of int64 or object
        The id at each position. Some may be unknown to the cache, as long as nobody asks for them.
    """

    def __init__(self, rows: RowsById, ids: np.ndarray) -> None:
        self.ids = ids
        self._rows = rows
        self._first_row = np.full(len(ids), -1, np.int64)
        self._num_rows = np.zeros(len(ids), np.int32)

    def find(self, positions: np.ndarray) -> FoundRows:
        """Find the rows of the examples at some positions, int64 [example].

        Raises
        ------
        UnknownExampleError
            An id is not in the cache.
        """
        ids, first_row = self.ids[positions], self._first_row[positions]
        if not (first_row < 0).any():
            return FoundRows(ids, first_row, self._num_rows[positions])
        found = self._rows.find(ids, where="a batch to come")
        self._num_rows[positions] = found.num_rows  # before the rows, by which another thread knows that both are there
        self._first_row[positions] = found.first_row
        return found


def _refuse_repeats(ids: np.ndarray, where: str) -> None:
    values = ids.tolist()
    if len(set(values)) == len(values):
        return
    repeated = next(value for value, times in Counter(values).items() if times > 1)
    raise DuplicateExampleError(
        f"{where}: the id {repeated!r} stands more than once in it. Ids name examples, so that two different inputs "
        "may carry one name here. Give every example an id of its own; or, where the sampler draws with replacement or "
        "the batches hold several augmentations of an example, join(..., allow_repeats=True)"
    )
