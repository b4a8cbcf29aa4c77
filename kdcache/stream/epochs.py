"""Epochs: the order of every epoch over the chosen examples, and the blocks of storage that a windowed one reads.

A *block* is a run of rows that is read at once: whole chunks of every teacher, within one shard. A *window* is some
blocks, from anywhere in the cache, that are held together while their examples are given in random order.
"""

from __future__ import annotations

__all__ = ["Epochs", "Shuffle", "Windows"]

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdcache.cache import SoftTargetCache
from kdcache.errors import OptionError
from kdcache.stream.joined import JoinedExamples
from kdcache.stream.order import Order, SequentialOrder, ShuffledOrder, WindowedOrder

Shuffle = bool | Literal["windowed"]

_BLOCK_BYTES = 2**18
"""Coded rows of a block at least: chunks of one or two hundred rows, so that a window holds many places of a cache."""
_BLOCKS_A_WINDOW = 8
"""A window that takes little has smaller blocks, so that it holds as many where chunks are small enough."""
_MOST_BLOCKS = 2**18
"""Blocks of a cache at most, since an epoch's order of them is drawn whole."""
_EXAMPLES_A_BLOCK = 8
"""Of examples with many rows, so many fill a block at least: its last one may reach into the next."""
_WINDOWS_AN_EPOCH = 24
_LEAST_WINDOW_BYTES = 2**23
_MOST_WINDOW_BYTES = 2**28


@dataclass(frozen=True)
class Windows:
    """How a cache is cut into blocks and windows: a pure function of its documents and of what a window may take.

    Parameters
    ----------
    block_rows : int
        Rows of a block; divides those of a shard.
    window_blocks : int
        Blocks of a window.
    row_bytes : int
        Coded bytes of a row, all chosen teachers together.
    """

    block_rows: int
    window_blocks: int
    row_bytes: int

    @property
    def window_bytes(self) -> int:
        """Coded rows of a window, in bytes; those of examples that reach into further blocks left out."""
        return self.window_blocks * self.block_rows * self.row_bytes

    @classmethod
    def of(
        cls,
        cache: SoftTargetCache,
        *,
        teachers: Sequence[str] | None,
        window_bytes: int | None,
        most_rows_an_example: int,
    ) -> Windows:
        """Cut a cache; by default a window holds a twenty-fourth of its rows, at least 8 MiB and at most 256 MiB.

        Raises
        ------
        OptionError
            `window_bytes` is below 1.
        UnknownTeacherError
            A teacher is not in the cache.
        """
        if window_bytes is not None and window_bytes < 1:
            raise OptionError(f"window_bytes is {window_bytes}; at least 1 is needed: one block is always held")
        specs = [reader.spec for reader in cache.codes_readers(teachers=teachers)]
        row_bytes = sum(spec.row_bytes for spec in specs)
        num_bytes = cache.document.padded_rows * row_bytes
        default = min(max(num_bytes // _WINDOWS_AN_EPOCH, _LEAST_WINDOW_BYTES), _MOST_WINDOW_BYTES)
        most_bytes = window_bytes or default
        least = max(min(_BLOCK_BYTES, most_bytes // _BLOCKS_A_WINDOW), num_bytes // _MOST_BLOCKS) // row_bytes
        if most_rows_an_example > 1:
            least = max(least, _EXAMPLES_A_BLOCK * most_rows_an_example)
        aligned = math.lcm(*(spec.chunk_rows for spec in specs))
        block_rows = _smallest_divisor(cache.document.shard_rows // aligned, math.ceil(least / aligned)) * aligned
        return cls(block_rows, max(1, most_bytes // (block_rows * row_bytes)), row_bytes)


@dataclass(frozen=True, eq=False)
class Epochs:
    """The order of every epoch, over the chosen examples.

    Attributes
    ----------
    examples : ndarray [example] of int64
        Positions in the inputs; what an order permutes. Those of a windowed order stand as in storage.
    windows : Windows or None
        Of a windowed order.
    """

    joined: JoinedExamples
    seed: int
    is_shuffled: bool
    examples: np.ndarray
    windows: Windows | None = None

    @classmethod
    def of(cls, joined: JoinedExamples, *, seed: int, shuffle: bool, windows: Windows | None) -> Epochs:
        """Shuffle some joined examples: within windows where these are given, else as a whole, or not at all."""
        examples = joined.indices if windows is None else joined.in_storage_order()
        return cls(joined, seed, shuffle, examples, windows)

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return len(self.examples)

    @functools.cached_property
    def digest(self) -> int:
        """48 bits that tell apart other examples, another order of them, other views and other rows of examples."""
        first_rows, num_rows = self.joined.places_of(self.examples)
        hasher = hashlib.blake2b(first_rows.tobytes(), digest_size=6)
        hasher.update(num_rows.tobytes())
        return int.from_bytes(hasher.digest(), "little")

    def order(self, epoch: int) -> Order:
        """Give the order of an epoch."""
        if not self.is_shuffled:
            return SequentialOrder(self.num_examples)
        if self.windows is None:
            return ShuffledOrder(self.num_examples, self.seed, epoch)
        return WindowedOrder(self._first_examples, self.windows.window_blocks, self.seed, epoch)

    def indices_at(self, order: Order, positions: np.ndarray) -> np.ndarray:
        """Give the examples at some positions of an epoch, int64 [position]: positions in the inputs."""
        found: np.ndarray = self.examples[order.at(positions)]
        return found

    @functools.cached_property
    def _first_examples(self) -> np.ndarray:
        return self.joined.first_of_blocks(self.examples, 1 if self.windows is None else self.windows.block_rows)


def _smallest_divisor(number: int, least: int) -> int:
    """Give the smallest divisor of a number that is at least `least`, or the number."""
    return next((divisor for divisor in range(max(1, least), number) if number % divisor == 0), number)
