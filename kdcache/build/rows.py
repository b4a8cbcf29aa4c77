"""Rows: which examples, and which batches of the grid, a shard is made of.

Inference batches lie on a fixed grid over the transfer set: batch k holds examples [k B, (k + 1) B). Which shards are
still missing never changes what a batch holds, so a row's logits are the same in a first, a resumed and a distributed
build. A batch may be larger or smaller than a shard, and may lie across shards.
"""

from __future__ import annotations

__all__ = ["BatchKey", "RowMap"]

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kdcache.documents import PlanDocument


class BatchKey(NamedTuple):
    """One batch of the grid, of one view."""

    view_index: int
    batch_index: int


@dataclass(frozen=True, eq=False)
class RowMap:
    """The rows of a plan, laid over its examples and batches.

    Parameters
    ----------
    plan : PlanDocument
    num_rows : ndarray [example] int32
        Rows of each example.
    """

    plan: PlanDocument
    num_rows: np.ndarray

    @cached_property
    def first_row(self) -> np.ndarray:
        """First row of each example within a view's block, and the end of the last: int64 [example + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_rows, dtype=np.int64)])

    @property
    def num_batches(self) -> int:
        """Batches of one view."""
        return -(-len(self.num_rows) // self.plan.batch_size)

    def shard_rows(self, shard_index: int) -> tuple[int, int, int]:
        """Give a shard's (view_index, first row, end row) within its view's block, without padding."""
        cache = self.plan.cache
        view_index, block = divmod(shard_index, cache.shards_per_view)
        start = block * cache.shard_rows
        return view_index, start, start + cache.rows_in_shard(shard_index)

    def batches_of_shard(self, shard_index: int) -> list[BatchKey]:
        """List the batches whose rows a shard holds, in order."""
        view_index, start, end = self.shard_rows(shard_index)
        first = int(np.searchsorted(self.first_row, start, side="right")) - 1
        last = int(np.searchsorted(self.first_row, end, side="left")) - 1
        size = self.plan.batch_size
        return [BatchKey(view_index, index) for index in range(first // size, last // size + 1)]

    def examples_of_batch(self, key: BatchKey) -> np.ndarray:
        """Positions of a batch's examples in the transfer set: int64 [example]."""
        start = key.batch_index * self.plan.batch_size
        return np.arange(start, min(start + self.plan.batch_size, len(self.num_rows)))

    def rows_of_batch(self, key: BatchKey) -> tuple[int, int]:
        """Give a batch's (first row, end row) within its view's block."""
        start = key.batch_index * self.plan.batch_size
        end = min(start + self.plan.batch_size, len(self.num_rows))
        return int(self.first_row[start]), int(self.first_row[end])

    def example_at(self, row: int) -> int:
        """Give the position of the example that a row of a view's block belongs to."""
        return int(np.searchsorted(self.first_row, row, side="right")) - 1
