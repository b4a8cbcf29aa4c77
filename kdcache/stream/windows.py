"""Windows in memory: the rows of one window laid down in the order of the epoch, while the window before is given.

Each chunk is decoded once an epoch, and each of its rows is put where the epoch wants it while the chunk is at hand:
a batch is a piece of what lies in memory, and nothing is gathered or copied again. Batches share the memory of their
window; it is used again as soon as nobody holds a batch of it.
"""

from __future__ import annotations

__all__ = ["WindowedRows"]

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import SoftTargetCache
from kdcache.soft_targets import SoftTargets
from kdcache.store import CodesReader
from kdcache.stream.batches import Wanted
from kdcache.stream.epochs import Epochs, Windows
from kdcache.stream.order import Order, WindowedOrder

NUM_THREADS = 2
"""Threads that decode. Decompressing leaves the interpreter to others, so that training goes on beside them."""
_PIECES_A_WINDOW = 8
"""Pieces that are handed to the threads: to hand over a block by itself would cost a tenth of decoding it."""
_HELD_WINDOWS = 3


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
    _room: list[_Room] = field(default_factory=list, init=False, repr=False)

    tier = "windows"

    @property
    def held_bytes(self) -> int:
        """Bytes of the windows that are held: one that is decoded, one that is given, one of which batches are in use.

        Of several ranks each holds its own rows alone, and so its part of this.
        """
        return _HELD_WINDOWS * self.windows.window_bytes

    def reading(self, order: Order, wanted: Wanted) -> _Reading:
        """Begin an epoch, of which only the wanted positions will be read."""
        if not isinstance(order, WindowedOrder):
            raise TypeError(f"windows are read in a WindowedOrder, not in a {type(order).__name__}")
        if not self._room:
            self._room.append(_Room(self.cache.codes_readers(teachers=self.teachers)))
        return _Reading(self, order, wanted, self._room[0])


class _Reading:
    """An epoch's rows, read forwards."""

    def __init__(self, source: WindowedRows, order: WindowedOrder, wanted: Wanted, room: _Room) -> None:
        self._source = source
        self._order = order
        self._wanted = wanted
        self._room = room
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="kdcache-windows")
        self._windows: dict[int, _Window] = {}

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:  # noqa: ARG002 - they follow from positions
        """Give the rows of examples at neighbouring wanted positions of the epoch, int64 [example].

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        windows = self._order.window_of(positions)
        edges = [0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(positions)]
        parts = [
            self._window(int(windows[start])).rows(int(positions[start]), int(positions[end - 1]))
            for start, end in itertools.pairwise(edges)
        ]
        codes = parts[0] if len(parts) == 1 else [_joined(same) for same in zip(*parts, strict=True)]
        return self._source.cache.wrap(codes, teachers=self._source.teachers)

    def close(self) -> None:
        """End the threads; what they are at is finished, the rest left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _window(self, index: int) -> _Window:
        for earlier in [held for held in self._windows if held < index]:
            self._windows.pop(earlier).done()
        for needed in range(index, min(index + 2, self._order.num_windows)):
            if needed not in self._windows:
                self._windows[needed] = self._load(needed)
        return self._windows[index]

    def _load(self, index: int) -> _Window:
        positions = self._wanted.within(*self._order.positions_of(index))
        epochs = self._source.epochs
        rows, num_rows = epochs.joined.rows_of(epochs.indices_at(self._order, positions))
        arrays = self._room.take(len(rows))
        places = np.argsort(rows, kind="stable")
        pieces = _cut_between_blocks(rows[places], self._source.windows.block_rows)
        loading = [
            self._pool.submit(reader.scatter, rows[places[piece]], array, places[piece])
            for piece in pieces
            for reader, array in zip(self._room.readers, arrays, strict=True)
        ]
        return _Window(positions, np.concatenate([[0], np.cumsum(num_rows)]), arrays, loading)


@dataclass(frozen=True, eq=False)
class _Window:
    """A window's rows in the order of the epoch, one array a teacher, and what is still being decoded of them."""

    positions: np.ndarray
    first_rows: np.ndarray
    arrays: list[np.ndarray]
    loading: list[Future[None]]

    def rows(self, first_position: int, last_position: int) -> list[Tensor]:
        """Give the rows of neighbouring positions, once all of the window are decoded."""
        self.done()
        start, end = np.searchsorted(self.positions, [first_position, last_position])
        return [torch.from_numpy(array[self.first_rows[start] : self.first_rows[end + 1]]) for array in self.arrays]

    def done(self) -> None:
        """Wait for all rows."""
        while self.loading:
            self.loading[-1].result()
            self.loading.pop()


@dataclass(eq=False)
class _Room:
    """Arrays for windows, one a teacher; taken again once no batch, and nothing made of one, shares their memory."""

    readers: Sequence[CodesReader]
    sets: list[list[np.ndarray]] = field(default_factory=list)

    def take(self, num_rows: int) -> list[np.ndarray]:
        """Give arrays [row, column] that nobody else reads."""
        unused = [arrays for arrays in self.sets if _are_unused(arrays)]
        self.sets = [arrays for arrays in self.sets if not any(arrays is other for other in unused)]
        fitting = [arrays for arrays in unused if len(arrays[0]) >= num_rows]
        arrays = fitting[0] if fitting else [_empty(reader, num_rows) for reader in self.readers]
        self.sets.append(arrays)
        return [array[:num_rows] for array in arrays]


def _are_unused(arrays: list[np.ndarray]) -> bool:
    """Tell whether nothing but the list refers to its arrays: every view of an array, and every tensor, does."""
    return all(sys.getrefcount(arrays[place]) <= 2 for place in range(len(arrays)))


def _empty(reader: CodesReader, num_rows: int) -> np.ndarray:
    return np.empty((num_rows, reader.spec.num_columns), reader.spec.little)


def _cut_between_blocks(rows: np.ndarray, block_rows: int) -> list[slice]:
    """Cut ascending rows into a few pieces, none within a block, so that no chunk is decoded twice."""
    edges = np.flatnonzero(np.diff(rows // block_rows)) + 1
    step = max(1, (len(edges) + 1) // _PIECES_A_WINDOW)
    cuts = [0, *edges[step - 1 :: step].tolist(), len(rows)]
    return [slice(start, end) for start, end in itertools.pairwise(cuts) if start < end]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dtype == torch.uint16:  # not every operation knows it
        return torch.cat([part.view(torch.int16) for part in parts]).view(torch.uint16)
    return torch.cat(list(parts))
