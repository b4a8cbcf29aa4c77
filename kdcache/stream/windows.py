"""Windows in memory: the rows of one window laid down in the order of the epoch, while the window before is given.

Each chunk is decoded once an epoch, and each of its rows is put where the epoch wants it while the chunk is at hand:
a batch is a piece of what lies in memory, and nothing is gathered or copied again. Batches share the memory of their
window; it is used again as soon as nobody holds a batch of it.
"""

from __future__ import annotations

__all__ = ["WindowedRows"]

import contextlib
import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import SoftTargetCache
from kdcache.errors import KdcacheError
from kdcache.soft_targets import SoftTargets
from kdcache.store import CodesReader
from kdcache.store.reader import DECODING_THREADS
from kdcache.stream.batches import Wanted
from kdcache.stream.epochs import Epochs, Windows
from kdcache.stream.order import Order, WindowedOrder
from kdcache.threads import LoopThreads

_PIECE_BYTES = 2**21
"""What is decoded at a time: small beside a step, and enough that batches are made some at a time in between. Each of
the two finds the processor's caches filled by the other, which costs a quarter where a piece is a batch."""
_FAR_PIECES = 8
"""Pieces of a window that lies far away, at most: a small one needs few shards, and so asks for few at once."""
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
    _idle: list[_Room] = field(default_factory=list, init=False, repr=False)
    """Memory of the epoch before, for the one to come; loops at the same time have some each."""

    tier = "windows"

    @property
    def held_bytes(self) -> int:
        """Bytes of the windows that are held: one that is decoded, one that is given, one of which batches are in use.

        More are held where the batches that wait or are kept belong to more windows. Of several ranks each holds its
        own rows alone, and so its part of this.
        """
        return _HELD_WINDOWS * self.windows.window_bytes

    def reading(self, order: Order, wanted: Wanted) -> _Reading:
        """Begin an epoch, of which only the wanted positions will be read."""
        if not isinstance(order, WindowedOrder):
            raise TypeError(f"windows are read in a WindowedOrder, not in a {type(order).__name__}")
        try:
            room = self._idle.pop()
        except IndexError:
            room = _Room(self.cache.codes_readers(teachers=self.teachers))
        return _Reading(self, order, wanted, room)


class _Reading:
    """An epoch's rows, read forwards."""

    def __init__(self, source: WindowedRows, order: WindowedOrder, wanted: Wanted, room: _Room) -> None:
        self._source = source
        self._order = order
        self._wanted = wanted
        self._room = room
        is_far = any(reader.is_far for reader in room.readers)
        # Near, who makes the batches also decodes: threads that want the interpreter at once cost a third more.
        self._threads = LoopThreads(DECODING_THREADS, "kdcache-windows") if is_far else None
        self._windows: deque[_Window] = deque()
        self._has_given = False  # a window behind the first would keep the first batch waiting
        self._begun_at = 0  # the position given when the window behind was begun
        first = wanted.first_from(0)
        if first is not None:  # threads begin with it at once, not only when its first batch is asked for
            self._window_at(first)

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:  # noqa: ARG002 - they follow from positions
        """Give the rows of examples at neighbouring wanted positions of the epoch, int64 [example].

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        first, last = int(positions[0]), int(positions[-1])
        parts = []
        while True:
            window = self._window_at(first)
            if last < window.end:
                parts.append(window.rows(first, last))
                break
            end = int(positions.searchsorted(window.end))
            parts.append(window.rows(first, int(positions[end - 1])))
            first = int(positions[end])
        self._has_given = True
        self._decode_along(last)
        codes = parts[0] if len(parts) == 1 else [_joined(same) for same in zip(*parts, strict=True)]
        return self._source.cache.wrap(codes, teachers=self._source.teachers)

    def close(self) -> None:
        """End the threads; what they are at is finished into memory that nobody else is given, the rest left."""
        if self._threads is not None:
            self._threads.leave()
        if not self._source._idle:  # noqa: SLF001 - its own kind
            self._source._idle.append(self._room)  # noqa: SLF001 - its own kind

    def _window_at(self, position: int) -> _Window:
        """Give the window of a position, which may be decoding yet."""
        if self._windows and position < self._windows[0].end:
            if self._has_given:
                self._begin_following(position)
            return self._windows[0]
        if len(self._windows) < 2 or position >= self._windows[1].end:  # at the start, and behind what was read on
            self._windows.clear()
            self._windows.append(self._load(position))
        else:
            self._windows.popleft().done()
            self._begin_following(position)
        return self._windows[0]

    def _begin_following(self, position: int) -> None:
        """Begin with the window behind, of which positions are wanted, where this position is given."""
        if len(self._windows) < 2:
            self._begun_at = position
            following = self._wanted.first_from(self._windows[0].end)
            if following is not None:
                self._windows.append(self._load(following))

    def _decode_along(self, position: int) -> None:
        """Decode as much of the window behind as was given of this one since, so that no batch waits for all of it.

        What is damaged there takes away nothing of this one: it is an error when its turn comes.
        """
        if self._threads is None and len(self._windows) > 1:
            window, following = self._windows
            with contextlib.suppress(KdcacheError):
                following.decode((position + 1 - self._begun_at) / (window.end - self._begun_at))

    def _load(self, position: int) -> _Window:
        start, end = self._order.positions_of(int(self._order.window_of(np.array([position]))[0]))
        positions = self._wanted.within(start, end)
        epochs = self._source.epochs
        rows, num_rows = epochs.joined.rows_of(epochs.indices_at(self._order, positions))
        arrays = self._room.take(len(rows))
        places = np.argsort(rows, kind="stable")
        pieces = _cut_between_blocks(rows[places], self._source.windows, is_far=self._threads is not None)
        tasks = [
            functools.partial(reader.scatter, rows[places[piece]], array, places[piece])
            for piece in pieces
            for reader, array in zip(self._room.readers, arrays, strict=True)
        ]
        loading: deque[Callable[[], None]] = deque(
            tasks if self._threads is None else [self._threads.submit(task).result for task in tasks]
        )
        first_rows = np.concatenate([[0], np.cumsum(num_rows)])
        return _Window(end, positions, first_rows, arrays, len(loading), loading)


@dataclass(frozen=True, eq=False)
class _Window:
    """A window's rows in the order of the epoch, one array a teacher, and what is still to be decoded of them.

    Each of what is `loading` decodes a piece, or waits for a thread that does.
    """

    end: int
    positions: np.ndarray
    first_rows: np.ndarray
    arrays: list[np.ndarray]
    num_pieces: int
    loading: deque[Callable[[], None]]

    def rows(self, first_position: int, last_position: int) -> list[Tensor]:
        """Give the rows of neighbouring positions, once all of the window are decoded."""
        self.done()
        start, end = self.positions.searchsorted([first_position, last_position])
        return [torch.from_numpy(array[self.first_rows[start] : self.first_rows[end + 1]]) for array in self.arrays]

    def done(self) -> None:
        """Have all rows decoded."""
        self.decode(1)

    def decode(self, share: float) -> None:
        """Have a share of the rows decoded, where that is not done yet."""
        while len(self.loading) > (1 - share) * self.num_pieces:
            self.loading[0]()
            self.loading.popleft()


@dataclass(eq=False)
class _Room:
    """Arrays for windows, one a teacher; taken again once no batch, and nothing made of one, shares their memory."""

    readers: Sequence[CodesReader]
    sets: list[list[np.ndarray]] = field(default_factory=list)

    def take(self, num_rows: int) -> list[np.ndarray]:
        """Give arrays [row, column] that nobody else reads."""
        used: list[list[np.ndarray]] = []
        unused: list[list[np.ndarray]] = []
        for arrays in self.sets:
            (unused if _are_unused(arrays) else used).append(arrays)
        fitting = [arrays for arrays in unused if len(arrays[0]) >= num_rows]
        arrays = fitting[0] if fitting else [_empty(reader, num_rows) for reader in self.readers]
        self.sets = [*used, arrays]
        return [array[:num_rows] for array in arrays]


def _are_unused(arrays: list[np.ndarray]) -> bool:
    """Tell whether nothing but the list refers to its arrays: every view of an array, and every tensor, does."""
    return all(sys.getrefcount(arrays[place]) <= 2 for place in range(len(arrays)))


def _empty(reader: CodesReader, num_rows: int) -> np.ndarray:
    return np.empty((num_rows, reader.spec.num_columns), reader.spec.little)


def _cut_between_blocks(rows: np.ndarray, windows: Windows, *, is_far: bool) -> list[slice]:
    """Cut ascending rows into pieces, none within a block, so that no chunk is decoded twice."""
    piece_bytes = max(_PIECE_BYTES, windows.window_bytes // _FAR_PIECES) if is_far else _PIECE_BYTES
    edges = np.flatnonzero(np.diff(rows // windows.block_rows)) + 1
    step = max(1, piece_bytes // (windows.block_rows * windows.row_bytes))
    cuts = [0, *edges[step - 1 :: step].tolist(), len(rows)]
    return [slice(start, end) for start, end in itertools.pairwise(cuts) if start < end]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dtype == torch.uint16:  # not every operation knows it
        return torch.cat([part.view(torch.int16) for part in parts]).view(torch.uint16)
    return torch.cat(list(parts))
