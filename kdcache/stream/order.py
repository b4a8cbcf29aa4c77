"""Order: in which order an epoch visits its examples, as a pure function of seed, epoch and position.

An *order* maps positions of an epoch to examples. `ShuffledOrder` is a random permutation of all of them;
`WindowedOrder` shuffles blocks and, within *windows* of a few blocks, their examples, so that a cache that does not fit
in memory is read block by block. Both say which examples stand at any positions without going through those before,
in memory that does not grow with the number of examples. Neither knows of batches, ranks or workers.
"""

from __future__ import annotations

__all__ = ["Order", "SequentialOrder", "ShuffledOrder", "WindowedOrder", "epoch_order"]

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.random  # NumPy loads it when first used, which would be within the first step
import numpy.typing as npt

MATERIALISED_EXAMPLES = 2**16
"""Permutations of no more examples are drawn whole, which takes half a mebibyte; larger ones are computed."""

_DRAWN_WINDOWS = 6
"""Windows whose examples are kept: steps are planned some windows before their rows are read."""
_NUM_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))

Positions = npt.NDArray[np.int64]


class Order(Protocol):
    """Which example stands at which position of an epoch."""

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        ...

    def at(self, positions: Positions) -> Positions:
        """Give the examples at some positions, int64 [position], each from 0 to `num_examples` - 1."""
        ...


@dataclass(frozen=True)
class SequentialOrder:
    """Every example at its own place.

    Parameters
    ----------
    num_examples : int
    """

    num_examples: int

    def at(self, positions: Positions) -> Positions:
        """Give the positions."""
        return positions


@dataclass(frozen=True)
class ShuffledOrder:
    """A random permutation of all examples, drawn from (seed, epoch), the same on every machine.

    Up to 65,536 examples it is drawn whole, with Philox. Above, it is computed where it is asked for: an eight-round
    Feistel network over the next power of two permutes it, and is applied again to what falls outside (cycle walking,
    Black and Rogaway 2002); fewer than two applications on average.

    Parameters
    ----------
    num_examples : int
    seed, epoch : int
        At least 0.
    """

    num_examples: int
    seed: int
    epoch: int
    stream: str = "order"
    """Tells permutations of one seed and epoch apart."""

    def at(self, positions: Positions) -> Positions:
        """Give the examples at some positions, int64 [position]."""
        if self.num_examples <= MATERIALISED_EXAMPLES:
            return self._whole[positions]
        places = positions.astype(np.uint64)
        places = self._permuted(places)
        outside = np.flatnonzero(places >= self.num_examples)
        while len(outside):
            places[outside] = self._permuted(places[outside])
            outside = outside[places[outside] >= self.num_examples]
        return places.astype(np.int64)

    @functools.cached_property
    def _whole(self) -> Positions:
        key = np.frombuffer(_digest(self._name, size=16), np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.num_examples)

    @functools.cached_property
    def _keys(self) -> list[np.uint64]:
        return list(np.frombuffer(_digest(self._name, size=8 * _NUM_ROUNDS), np.uint64))

    @property
    def _name(self) -> str:
        return f"{self.stream}|{self.seed}|{self.epoch}"

    def _permuted(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Apply the network to numbers of as many bits as the largest example has."""
        num_bits = (self.num_examples - 1).bit_length()
        low_bits = np.uint64(num_bits // 2)
        low_mask = np.uint64((1 << int(low_bits)) - 1)
        high_mask = np.uint64((1 << (num_bits - int(low_bits))) - 1)
        low, high = places & low_mask, places >> low_bits
        for index, key in enumerate(self._keys):
            if index % 2:
                low ^= _mixed(high, key) & low_mask
            else:
                high ^= _mixed(low, key) & high_mask
        return (high << low_bits) | low


@dataclass(frozen=True)
class WindowedOrder:
    """Blocks in random order, and within each window of some of them their examples in random order.

    Examples are numbered as they lie in storage: those of block s from `first_examples[s]` on. What is read while a
    window lasts are its blocks, and the block behind each where its last example has several rows.

    Parameters
    ----------
    first_examples : ndarray [block + 1] of int64
        First example of every block, and behind the last one the number of all. Blocks may be empty.
    window_blocks : int
        Blocks of a window; the last window may have fewer.
    seed, epoch : int
        At least 0.
    """

    first_examples: Positions
    window_blocks: int
    seed: int
    epoch: int
    _permutations: dict[int, ShuffledOrder] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return int(self.first_examples[-1])

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return -(-len(self.blocks) // self.window_blocks)

    @functools.cached_property
    def blocks(self) -> Positions:
        """Blocks in the order in which they are visited, int64 [block]; without empty ones."""
        filled = np.flatnonzero(self._num_examples)
        shuffled = ShuffledOrder(len(filled), self.seed, self.epoch, "blocks")
        return filled[shuffled.at(np.arange(len(filled)))]

    def window_of(self, positions: Positions) -> Positions:
        """Give the window in which each position lies, int64 [position]; positions ascend through windows."""
        return np.searchsorted(self._window_ends, positions, side="right")

    def positions_of(self, window_index: int) -> tuple[int, int]:
        """Give the first position of a window, and the one behind its last."""
        return int(self._window_starts[window_index]), int(self._window_ends[window_index])

    def at(self, positions: Positions) -> Positions:
        """Give the examples at some positions, int64 [position]; quickest where they follow one another."""
        if len(positions) and bool((np.diff(positions) == 1).all()):
            return self._between(int(positions[0]), int(positions[-1]) + 1)
        return self._computed(positions)

    def _between(self, start: int, stop: int) -> Positions:
        """Give the examples at positions that follow one another, whole windows drawn where these are small."""
        parts = []
        first, last = self.window_of(np.array([start, stop - 1])).tolist()
        for window in range(first, last + 1):
            begin, end = self.positions_of(window)
            if end - begin <= MATERIALISED_EXAMPLES:
                parts.append(self._drawn(window)[max(start, begin) - begin : min(stop, end) - begin])
            else:
                parts.append(self._computed(np.arange(max(start, begin), min(stop, end))))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @functools.cached_property
    def _drawn(self) -> Callable[[int], Positions]:
        """Give the examples of a whole window, int64 [position]; those last asked for are kept, for several threads."""
        return functools.lru_cache(_DRAWN_WINDOWS)(self._draw)

    def _draw(self, window: int) -> Positions:
        blocks = self.blocks[window * self.window_blocks : (window + 1) * self.window_blocks]
        counts = self._num_examples[blocks]
        ends = np.cumsum(counts)
        stored = np.repeat(self.first_examples[blocks] - (ends - counts), counts) + np.arange(ends[-1])
        drawn = stored[self._permutation(window, len(stored)).at(np.arange(len(stored)))]
        drawn.flags.writeable = False  # parts of it are given away
        return drawn

    def _computed(self, positions: Positions) -> Positions:
        windows = self.window_of(positions)
        places = np.empty_like(positions)
        for window in range(int(windows.min(initial=self.num_windows)), int(windows.max(initial=-1)) + 1):
            chosen = windows == window
            start, end = self._window_starts[window], self._window_ends[window]
            places[chosen] = start + self._permutation(window, int(end - start)).at(positions[chosen] - start)
        visited = np.searchsorted(self._block_ends, places, side="right")
        blocks = self.blocks[visited]
        first_places = self._block_ends[visited] - self._num_examples[blocks]
        return self.first_examples[blocks] + places - first_places

    def _permutation(self, window: int, num_examples: int) -> ShuffledOrder:
        permutation = self._permutations.get(window)
        if permutation is None:
            permutation = ShuffledOrder(num_examples, self.seed, self.epoch, f"window|{window}")
            if len(self._permutations) > 1:
                self._permutations.clear()  # another thread may do the same, and needs only its own
            self._permutations[window] = permutation
        return permutation

    @functools.cached_property
    def _num_examples(self) -> Positions:
        return np.diff(self.first_examples)

    @functools.cached_property
    def _block_ends(self) -> Positions:
        return np.cumsum(self._num_examples[self.blocks])

    @functools.cached_property
    def _window_ends(self) -> Positions:
        last = np.arange(1, self.num_windows + 1) * self.window_blocks - 1
        return self._block_ends[np.minimum(last, len(self._block_ends) - 1)]

    @functools.cached_property
    def _window_starts(self) -> Positions:
        return np.concatenate([[0], self._window_ends[:-1]])


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> Positions:
    """Give the permutation of an epoch whole; `ShuffledOrder` gives parts of it.

    Parameters
    ----------
    num_examples : int
    seed, epoch : int
        At least 0.

    Returns
    -------
    ndarray [example] int64
        A permutation of 0 .. num_examples - 1.
    """
    return ShuffledOrder(num_examples, seed, epoch).at(np.arange(num_examples))


def _digest(name: str, *, size: int) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=size).digest()


def _mixed(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Mix numbers with a key; the middle bits of a product depend on all bits of what is multiplied."""
    product = (values + key) * _MULTIPLIERS[0]
    product ^= product >> np.uint64(29)
    product *= _MULTIPLIERS[1]
    return product >> np.uint64(32)
