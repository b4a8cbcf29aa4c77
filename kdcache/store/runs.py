"""Runs: some chunks decoded behind one another before anything is done with their rows."""

from __future__ import annotations

__all__ = ["Run"]

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.store.room import room
from kdcache.store.shards import ShardSpec

_RUN_BYTES = 2**18
"""What is decoded before it is looked at and put anywhere: what a core's own cache holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Chunks that are decoded behind one another before anything is done with their rows, and which rows are wanted.

    Parameters
    ----------
    spec : ShardSpec
    num_chunks : int
        Chunks of a run.
    chunks : list of int
        Those that are wanted, ascending.
    edges : list of int
        Where each chunk's rows begin among the wanted ones, and behind them their number.
    within : ndarray [row] of int64, or None
        The place of each row in its run; None where all rows of all chunks are wanted once.
    decoded : ndarray [row, column]
        Memory for a run.
    """

    spec: ShardSpec
    num_chunks: int
    chunks: list[int]
    edges: list[int]
    within: npt.NDArray[np.int64] | None
    decoded: npt.NDArray[Any]

    @classmethod
    def over(cls, rows: npt.NDArray[np.int64], spec: ShardSpec) -> Run:
        """Plan the decoding of ascending rows."""
        chunk_of = rows // spec.chunk_rows
        starts = np.flatnonzero(np.diff(chunk_of, prepend=-1))
        num_chunks = max(1, min(len(starts), _RUN_BYTES // spec.chunk_bytes))
        within = None
        if len(rows) != len(starts) * spec.chunk_rows or not (np.diff(rows) > 0).all():
            number = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rows)))
            within = number % num_chunks * spec.chunk_rows + rows % spec.chunk_rows
        decoded = room("decoded", num_chunks * spec.chunk_bytes).view(spec.little).reshape(-1, spec.num_columns)
        return cls(spec, num_chunks, chunk_of[starts].tolist(), [*starts.tolist(), len(rows)], within, decoded)

    def decoded_chunk(self, place: int) -> npt.NDArray[Any]:
        """Give the memory of a chunk by its place in the run."""
        return self.decoded[place * self.spec.chunk_rows : (place + 1) * self.spec.chunk_rows]

    def rows_of(self, first: int, num_chunks: int) -> tuple[slice, npt.NDArray[Any]]:
        """Give the wanted rows of decoded chunks, from the `first` wanted one on: which they are, and themselves."""
        part = slice(self.edges[first], self.edges[first + num_chunks])
        if self.within is None:
            return part, self.decoded[: num_chunks * self.spec.chunk_rows]
        return part, self.decoded[self.within[part]]
