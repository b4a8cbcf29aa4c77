"""Inputs joined with a cache by example_id: which rows an example has, and whether it is what the teachers saw."""

from __future__ import annotations

__all__ = ["JoinedExamples", "ids_as_inputs"]

from collections.abc import Sequence
from typing import Any

import numpy as np

import kdcache.store.parquet  # noqa: F401 - the first batch is held against a Parquet file; Arrow takes long to load
from kdcache.cache import SoftTargetCache
from kdcache.errors import InputMismatchError, ShapeError, TransferSetError, UnknownExampleError
from kdcache.row_selection import rows_of_examples
from kdcache.transfer_set import TransferSet
from kdcache.transfer_set.sources import ListSource


class JoinedExamples:
    """Chosen examples of a transfer set beside their rows in a cache, found once, by id.

    Views and labels are held against the cache's here; inputs, by `check_digests`, as they are read.

    Parameters
    ----------
    cache : SoftTargetCache
    inputs : TransferSet
    example_ids : sequence of int or str, optional
        Some of the inputs alone; all where absent.
    view_index : int
    checks_inputs : bool
        Hold views and inputs against the cache's; nothing to hold where the inputs are the cache's own ids.

    Attributes
    ----------
    indices : ndarray [example] of int64
        The chosen examples' positions in the inputs.

    Raises
    ------
    InputMismatchError
        Views or labels are not those of the cache.
    ShapeError
        An example has another number of rows than in the cache.
    TransferSetError
        No example is chosen.
    UnknownExampleError
        An example is not in the cache, or a chosen id not in the inputs.
    """

    def __init__(
        self,
        cache: SoftTargetCache,
        inputs: TransferSet,
        *,
        example_ids: object | None,
        view_index: int,
        checks_inputs: bool = True,
    ) -> None:
        self.cache = cache
        self.inputs = inputs
        self.view_index = view_index
        self.indices = np.arange(len(inputs)) if example_ids is None else inputs.indices_of(np.asarray(example_ids))
        if len(self.indices) == 0:
            raise TransferSetError("there are no examples to train on: example_ids is empty")
        self._checks_inputs = checks_inputs
        if checks_inputs:
            self._check_views()
        self._first_row, self._num_rows = self._join()
        self._check_labels()
        self.has_single_rows = bool((self._num_rows[self.indices] == 1).all())

    def rows_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the row numbers of examples, int64 [row], one example's after the other's, and how many each has.

        Parameters
        ----------
        indices : ndarray [example] of int64
            Positions in the inputs.
        """
        first_row, num_rows = self._first_row[indices], self._num_rows[indices]
        return rows_of_examples(first_row, num_rows), num_rows

    def places_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the first row number of examples, int64 [example], and how many rows each has, int32 [example]."""
        return self._first_row[indices], self._num_rows[indices]

    @property
    def most_rows_an_example(self) -> int:
        """Rows of the chosen example that has most."""
        return int(self._num_rows[self.indices].max())

    def in_storage_order(self) -> np.ndarray:
        """Give the chosen examples' positions in the inputs, as their rows lie in the cache: int64 [example]."""
        first_rows = self._first_row[self.indices]
        if bool((np.diff(first_rows) > 0).all()):
            return self.indices
        return self.indices[np.argsort(first_rows, kind="stable")]

    def first_of_blocks(self, stored: np.ndarray, block_rows: int) -> np.ndarray:
        """Give for every block of the view the first of its examples among `stored`, and behind all their number.

        Parameters
        ----------
        stored : ndarray [example] of int64
            As `in_storage_order` gives them.
        block_rows : int
            Rows of a block. An example belongs to the block in which its first row lies.

        Returns
        -------
        ndarray [block + 1] of int64
        """
        first_row = self.view_index * self.cache.document.padded_rows
        edges = first_row + np.arange(0, self.cache.document.padded_rows + 1, block_rows)
        return np.searchsorted(self._first_row[stored], edges)

    @property
    def has_digests(self) -> bool:
        """Whether inputs can be held against digests of what the teachers saw."""
        return self._checks_inputs and self.cache.document.has_input_digests

    def check_digests(self, indices: np.ndarray, digests: Sequence[bytes]) -> None:
        """Hold digests of inputs against those of what the teachers saw.

        Raises
        ------
        InputMismatchError
            An input is another one.
        """
        kept = self.cache.input_digests_of(self._example_of_row(self._rows_in_view(indices)))
        if kept is None:
            return
        for index, found, digest in zip(indices.tolist(), digests, kept, strict=True):
            if found != digest.tobytes():
                raise InputMismatchError(
                    f"example {self.inputs.example_id(index)!r} (position {index} of the inputs) is not the input "
                    f"that the teachers of cache {self.cache.address} saw: its digest differs. Its soft targets would "
                    "be wrong. Give the dataset the cache was built from, before any augmentation, under the same ids "
                    "and in the same dtype: float64 is another input than float32"
                )

    def _join(self) -> tuple[np.ndarray, np.ndarray]:
        """Find every example's rows by its id, once: first row int64 [example] and number of rows int32 [example]."""
        first_row = np.full(len(self.inputs), -1, np.int64)
        num_rows = np.zeros(len(self.inputs), np.int32)
        ids = self.inputs.example_ids[self.indices]
        try:
            first_row[self.indices], num_rows[self.indices] = self._located(ids)
        except UnknownExampleError as error:
            raise UnknownExampleError(
                f"the inputs' ids are not those cache {self.cache.address} was built with: give them, TransferSet("
                f"dataset, example_ids=...). The inputs have {len(self.inputs)} examples, the cache "
                f"{self.cache.num_examples}; where it has some of them, train on those alone: example_ids=. {error}"
            ) from error
        differ = self.indices[num_rows[self.indices] != self.inputs.num_rows[self.indices]]
        if len(differ):
            index = int(differ[0])
            raise ShapeError(
                f"example {self.inputs.example_id(index)!r} has {self.inputs.num_rows[index]} row(s) by the inputs and "
                f"{num_rows[index]} in cache {self.cache.address}; give TransferSet(num_rows=...) as when it was built"
            )
        return first_row, num_rows

    def _located(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cache = self.cache
        has_view = 0 <= self.view_index < cache.num_views
        if has_view and cache.are_all_in_row_order(ids):
            # The usual case: looking all of them up takes several times as long as comparing.
            first_row = np.arange(cache.num_examples) + self.view_index * cache.document.padded_rows
            return first_row, np.ones(cache.num_examples, np.int32)
        return cache.locate(ids, view_index=self.view_index)

    def _check_views(self) -> None:
        kept = self.cache.document.view
        views = self.inputs.views
        ours = None if views is None else (views.name, views.seed)
        theirs = None if kept is None else (kept.name, kept.seed)
        if ours != theirs:
            raise InputMismatchError(
                f"the inputs have {_views_in_words(ours)}, the teachers of cache {self.cache.address} saw "
                f"{_views_in_words(theirs)}: the soft targets would be those of other inputs. Give the TransferSet the "
                "views that the cache was built with, or none where it was built without"
            )

    def _check_labels(self) -> None:
        ours = self.inputs.labels
        theirs = self.cache.labels if ours is not None and self._checks_inputs else None
        if ours is None or theirs is None:
            return
        kept = theirs[self._example_of_row(self._rows_in_view(self.indices))]
        differ = np.flatnonzero(ours[self.indices] != kept)
        if len(differ):
            index = int(self.indices[differ[0]])
            raise InputMismatchError(
                f"{len(differ)} label(s) differ from those cache {self.cache.address} was built with: example "
                f"{self.inputs.example_id(index)!r} has {ours[index]} here and {kept[differ[0]]} there. Give the "
                "transfer set the cache was built from, or build a cache from this one"
            )

    def _rows_in_view(self, indices: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._first_row[indices] % self.cache.document.padded_rows
        return rows

    def _example_of_row(self, first_rows: np.ndarray) -> np.ndarray:
        if self.cache.document.num_rows == self.cache.document.num_examples:
            return first_rows
        found: np.ndarray = np.searchsorted(self.cache.first_rows, first_rows)
        return found


def ids_as_inputs(cache: SoftTargetCache) -> TransferSet:
    """Make a transfer set of a cache's own examples, whose inputs are their ids: a tensor of int64, or a list of str.

    For whoever has the inputs elsewhere, or needs none.

    Raises
    ------
    CorruptCacheError
        The example table is damaged, or an id stands twice in it.
    """
    ids = cache.example_ids
    ends = np.append(cache.first_rows[1:], cache.document.num_rows)
    options: dict[str, Any] = {"labels": cache.labels, "num_rows": ends - cache.first_rows, "digest_inputs": False}
    if len(set(ids.tolist())) < len(ids):  # said here: by the transfer set's own error the ids would be the caller's
        raise cache.store.examples_place().corrupt("an example's id stands in it more than once")
    try:
        if ids.dtype.kind == "i":
            return TransferSet.from_arrays(ids, example_ids=ids, **options)
        return TransferSet(ListSource(ids.tolist()), example_ids=ids, collate=list, **options)
    except TransferSetError as error:
        raise cache.store.examples_place().corrupt(f"its examples are no transfer set ({error})") from error


def _views_in_words(views: tuple[str, int] | None) -> str:
    return "no views" if views is None else f"views {views[0]!r} with seed {views[1]}"
