"""The examples of an open cache, by columns: ids, labels, input digests and first rows."""

from __future__ import annotations

__all__ = ["MAX_HELD_DIGESTS", "OpenExamples"]

import functools

import numpy as np

from kdcache.documents import CacheDocument
from kdcache.store import CacheStore

MAX_HELD_DIGESTS = 2**22
"""Input digests, of 16 bytes each, that are held in memory whole."""


class OpenExamples:
    """Columns of the example table, each read when it is first asked for.

    Parameters
    ----------
    store : CacheStore
    document : CacheDocument
    examples_sha256 : str, optional
        Of the example table, as complete.json names it.
    """

    def __init__(self, store: CacheStore, document: CacheDocument, *, examples_sha256: str | None = None) -> None:
        self.document = document
        self._store = store
        self._examples_sha256 = examples_sha256

    def _column(self, name: str) -> np.ndarray | None:
        return self._store.example_column(name, sha256=self._examples_sha256)

    @property
    def num_examples(self) -> int:
        """Examples of the transfer set."""
        return self.document.num_examples

    @functools.cached_property
    def example_ids(self) -> np.ndarray:
        """Ids of all examples in row order: int64 or object [example]. Read when first asked for."""
        ids = self._column("example_id")
        return np.asarray(ids)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """Labels of all examples in row order, int64 [example], or None. Read when first asked for."""
        return self._column("label")

    @functools.cached_property
    def input_digests(self) -> np.ndarray | None:
        """Input digests of all examples in row order, uint8 [example, 16], or None. Read when first asked for."""
        return self._column("input_digest")

    def input_digests_of(self, example_indices: np.ndarray) -> np.ndarray | None:
        """Read the input digests of some examples by their place in row order, uint8 [example, 16], or None.

        Held in memory where all take no more than 64 MiB; else only the parts of the example table are read that hold
        these.
        """
        if self.num_examples <= MAX_HELD_DIGESTS:
            return None if self.input_digests is None else self.input_digests[example_indices]
        return self._store.example_values("input_digest", example_indices)

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """First row of every example within a view, int64 [example]. Read when first asked for.

        Raises
        ------
        CorruptCacheError
            They do not ascend from 0 to the rows that a view has.
        """
        first_rows = np.asarray(self._column("first_row"))
        num_rows = np.diff(first_rows, append=self.document.num_rows)
        if first_rows[0] or num_rows.min() < 1 or num_rows.max() >= 2**31:
            reason = f"its first rows do not ascend from 0 to the {self.document.num_rows} rows of a view"
            raise self._store.examples_place().corrupt(reason)
        return first_rows
