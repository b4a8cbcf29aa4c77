"""Windows in memory: the blocks of one window decoded while the window before is given, in memory that does not grow.

Two windows are held at a time. Each is decoded once an epoch, block by block on a few threads, straight into arrays
that are taken once and used again by every second window.
"""

from __future__ import annotations

__all__ = ["WindowedRows"]

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import SoftTargetCache
from kdcache.row_selection import select_rows
from kdcache.soft_targets import SoftTargets
from kdcache.store import CodesReader
from kdcache.store.reader import distinct
from kdcache.stream.epochs import Epochs, Windows
from kdcache.stream.order import Order, WindowedOrder

NUM_THREADS = 2
"""Threads that decode. Decompressing leaves the interpreter to others, so that training goes on beside them."""
_PIECES_A_WINDOW = 8
"""Pieces that are handed to the threads: to hand over a block by itself would cost a tenth of decoding it."""


@dataclass(frozen=True, eq=False)
class WindowedRows:
    """Rows of a windowed order, read from compressed shards.

    Parameters
    ----------
    cache : SoftTargetCache
    epochs : Epochs
        Of windows.
    windows : Windows
        Those of `epochs`.
    teachers : sequence of str, optional
    """

    cache: SoftTargetCache
    epochs: Epochs
    windows: Windows
    teachers: Sequence[str] | None = None

    tier = "windows"

    @property
    def held_bytes(self) -> int:
        """Bytes of the two windows that are held, without the blocks into which examples reach."""
        return 2 * self.windows.window_bytes

    def reading(self, order: Order) -> _Reading:
        """Begin an epoch."""
        if not isinstance(order, WindowedOrder):
            raise TypeError(f"windows are read in a WindowedOrder, not in a {type(order).__name__}")
        return _Reading(self, order)


class _Reading:
    """An epoch's rows, read forwards: a window's arrays are another's as soon as the one behind it is asked for."""

    def __init__(self, source: WindowedRows, order: WindowedOrder) -> None:
        self._source = source
        self._order = order
        self._readers = source.cache.codes_readers(teachers=source.teachers)
        self._reach = _reach(source.epochs, source.windows.block_rows)
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="kdcache-windows")
        self._windows: dict[int, _Window] = {}
        self._free: list[list[np.ndarray]] = []

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:
        """Read rows by number, int64 [row], of examples at positions of the epoch, int64 [row], which ascend.

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        windows = self._order.window_of(positions)
        edges = [0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(rows)]
        parts = [self._window(int(windows[start])).rows(rows[start:end]) for start, end in itertools.pairwise(edges)]
        codes = parts[0] if len(parts) == 1 else [torch.cat(_movable(same)) for same in zip(*parts, strict=True)]
        typed = [part.view(first.dtype) for part, first in zip(codes, parts[0], strict=True)]
        return self._source.cache.wrap(typed, teachers=self._source.teachers)

    def close(self) -> None:
        """End the threads; what they are at is finished, the rest left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _window(self, index: int) -> _Window:
        for earlier in [held for held in self._windows if held < index]:
            self._free.append(self._windows.pop(earlier).done())
        for wanted in range(index, min(index + 2, self._order.num_windows)):
            if wanted not in self._windows:
                self._windows[wanted] = self._load(wanted)
        return self._windows[index]

    def _load(self, index: int) -> _Window:
        block_rows = self._source.windows.block_rows
        blocks = np.sort(self._order.blocks_of(index))
        if self._reach is not None:
            blocks = distinct(np.concatenate([np.arange(block, self._reach[block] + 1) for block in blocks]))
        arrays = self._arrays(len(blocks) * block_rows)
        first_row = self._source.epochs.joined.view_index * self._source.cache.document.padded_rows
        pieces = np.array_split(np.arange(len(blocks)), min(len(blocks), _PIECES_A_WINDOW))
        futures = [self._pool.submit(self._decode, blocks[places], places, first_row, arrays) for places in pieces]
        return _Window(blocks + first_row // block_rows, block_rows, arrays, futures)

    def _decode(self, blocks: np.ndarray, places: np.ndarray, first_row: int, arrays: list[np.ndarray]) -> None:
        block_rows = self._source.windows.block_rows
        for block, place in zip(blocks.tolist(), places.tolist(), strict=True):
            for reader, array in zip(self._readers, arrays, strict=True):
                room = array[place * block_rows : (place + 1) * block_rows]
                reader.read_block(first_row + block * block_rows, room)

    def _arrays(self, num_rows: int) -> list[np.ndarray]:
        arrays = self._free.pop() if self._free else None
        if arrays is None or len(arrays[0]) < num_rows:
            arrays = [_room(reader, num_rows) for reader in self._readers]
        return arrays


@dataclass(frozen=True, eq=False)
class _Window:
    """Blocks side by side in arrays, ascending, and what is still being decoded of them."""

    blocks: np.ndarray
    block_rows: int
    arrays: list[np.ndarray]
    loading: list[Future[None]]

    def rows(self, rows: np.ndarray) -> list[Tensor]:
        """Copy rows out of the arrays, once all are decoded."""
        self.done()
        places = np.searchsorted(self.blocks, rows // self.block_rows) * self.block_rows + rows % self.block_rows
        index = torch.from_numpy(places)
        return [select_rows(torch.from_numpy(array), index) for array in self.arrays]

    def done(self) -> list[np.ndarray]:
        """Wait for all blocks, and give the arrays."""
        while self.loading:
            self.loading[-1].result()
            self.loading.pop()
        return self.arrays


def _reach(epochs: Epochs, block_rows: int) -> np.ndarray | None:
    """Give for every block of the view the last one in which an example of it has rows, int64 [block], or None."""
    if epochs.joined.has_single_rows:
        return None
    padded_rows = epochs.joined.cache.document.padded_rows
    reach = np.arange(padded_rows // block_rows)
    first_rows, num_rows = epochs.joined.places_of(epochs.examples)
    first_rows = first_rows % padded_rows
    np.maximum.at(reach, first_rows // block_rows, (first_rows + num_rows - 1) // block_rows)
    return reach


def _room(reader: CodesReader, num_rows: int) -> np.ndarray:
    return np.empty((num_rows, reader.spec.num_columns), reader.spec.little)


def _movable(parts: Sequence[Tensor]) -> list[Tensor]:
    return [part.view(torch.int16) if part.dtype == torch.uint16 else part for part in parts]
