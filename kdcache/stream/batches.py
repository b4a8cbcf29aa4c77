"""Batches: an epoch's positions cut into global batches, and the part of each that one rank trains on.

A *global batch* is what all ranks together take in a step. Where it begins and ends depends on the batch size alone, so
that the sequence of global batches is the same for every world size and every number of workers; a rank takes a
contiguous part of each.
"""

from __future__ import annotations

__all__ = ["GlobalBatches", "Topology", "Wanted"]

from dataclasses import dataclass

import numpy as np
from torch import distributed

from kdcache.errors import OptionError, ShapeError


@dataclass(frozen=True)
class Topology:
    """One of several processes that train one student together.

    Parameters
    ----------
    rank : int
        From 0.
    world_size : int
        Processes there are, at least 1.

    Raises
    ------
    OptionError
        There is no such rank.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise OptionError(
                f"rank {self.rank} of world_size {self.world_size}: ranks go from 0 to world_size - 1. Give both, or "
                "neither where torch.distributed is initialised"
            )

    @classmethod
    def current(cls, rank: int | None, world_size: int | None) -> Topology:
        """Take what is given; else what torch.distributed says where it is initialised; else one process alone.

        Raises
        ------
        OptionError
            One of the two is given without the other, or there is no such rank.
        """
        if (rank is None) != (world_size is None):
            raise OptionError(f"rank is {rank} and world_size {world_size}: give both, or neither")
        if rank is not None and world_size is not None:
            return cls(rank, world_size)
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """Give this rank's part of some positions; parts differ by one position at most.

        Examples
        --------
        >>> [Topology(rank, 3).part(10, 17) for rank in range(3)]
        [(10, 13), (13, 15), (15, 17)]
        """
        each, over = divmod(stop - start, self.world_size)
        first = start + self.rank * each + min(self.rank, over)
        return first, first + each + (self.rank < over)


@dataclass(frozen=True)
class GlobalBatches:
    """An epoch's positions cut into global batches.

    Parameters
    ----------
    num_examples : int
    batch_size : int
        Examples of all ranks together.
    drop_last : bool
        Leave out a last batch that is smaller.

    Raises
    ------
    ShapeError
        The batch size is below 1, or so large that `drop_last` would leave out all examples.
    """

    num_examples: int
    batch_size: int
    drop_last: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ShapeError(f"batch_size is {self.batch_size}; at least 1 is needed")
        if self.drop_last and self.batch_size > self.num_examples:
            raise ShapeError(
                f"batch_size is {self.batch_size} and there are {self.num_examples} examples: drop_last=True would "
                "leave all of them out. Make batches smaller, or leave drop_last out"
            )

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def positions(self, batch_index: int) -> tuple[int, int]:
        """Give the first position of a global batch, and the one behind its last."""
        start = batch_index * self.batch_size
        return start, min(start + self.batch_size, self.num_examples)

    def check_parts(self, topology: Topology) -> None:
        """Refuse batches of which a rank would get nothing, while others train: collective operations would differ.

        Raises
        ------
        ShapeError
            A batch has fewer examples than there are ranks.
        """
        if self.batch_size < topology.world_size:
            raise ShapeError(
                f"a global batch of {self.batch_size} examples cannot be shared by {topology.world_size} ranks; give a "
                "batch_size of world_size or more: it counts the examples of all ranks together"
            )
        start, stop = self.positions(len(self) - 1)
        if stop - start < topology.world_size:
            raise ShapeError(
                f"the last of {len(self)} batches has {stop - start} example(s) for {topology.world_size} ranks, so "
                "that some would have none. Give drop_last=True, or another batch_size"
            )


@dataclass(frozen=True)
class Wanted:
    """The positions of an epoch that one rank trains on, from a batch on.

    Parameters
    ----------
    batches : GlobalBatches
    topology : Topology
    first_batch : int
    """

    batches: GlobalBatches
    topology: Topology
    first_batch: int = 0

    def within(self, start: int, stop: int) -> np.ndarray:
        """Give those of them from `start` to `stop` - 1, int64 [position], ascending.

        Examples
        --------
        >>> Wanted(GlobalBatches(10, 4, drop_last=True), Topology(1, 2)).within(0, 10).tolist()
        [2, 3, 6, 7]
        """
        size = self.batches.batch_size
        numbers = range(max(start // size, self.first_batch), min(-(-stop // size), len(self.batches)))
        parts = [self.topology.part(*self.batches.positions(number)) for number in numbers]
        found = [np.arange(max(first, start), min(last, stop)) for first, last in parts]
        return np.concatenate([np.empty(0, np.int64), *found])

    def first_from(self, start: int) -> int | None:
        """Give the first of them from `start` on; None where there is none.

        Examples
        --------
        >>> Wanted(GlobalBatches(10, 4, drop_last=True), Topology(1, 2)).first_from(4)
        6
        """
        for number in range(max(start // self.batches.batch_size, self.first_batch), len(self.batches)):
            first, last = self.topology.part(*self.batches.positions(number))
            if start < last:
                return max(first, start)
        return None
