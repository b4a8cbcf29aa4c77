"""Codes in memory: decoded as their rows are first asked for, and behind that all the others, each chunk once."""

from __future__ import annotations

__all__ = ["ResidentCodes"]

import contextlib
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from kdcache.errors import KdcacheError
from kdcache.store.codes_reader import CodesReader
from kdcache.store.locks import Renewed
from kdcache.store.reader import DECODING_THREADS, distinct

_PIECE_CHUNKS = 8
"""Chunks decoded ahead in one go, before rows that are waited for get their turn."""
_FETCHING_THREADS = 8
"""Threads where shards lie far away: nearly all of their time they wait for an answer."""


class ResidentCodes:
    """All rows of one teacher's codes, held in memory; safe between threads, and in a forked process.

    Parameters
    ----------
    reader : CodesReader
        Where the rows come from.
    num_rows : int
        Rows of all views, padding included: row numbers are places in `codes`.

    Attributes
    ----------
    codes : ndarray [row, column]
        In the stored dtype. Only rows that `fill` or `fill_all` was asked for may be read.
    """

    def __init__(self, reader: CodesReader, num_rows: int) -> None:
        self._reader = reader
        self._chunk_rows = reader.spec.chunk_rows
        self.codes = np.empty((num_rows, reader.spec.num_columns), reader.spec.little)
        self._is_filled = np.zeros(num_rows // self._chunk_rows, bool)
        self.is_whole = False
        self._start()
        Renewed.add(self)

    def fill(self, rows: np.ndarray) -> None:
        """Make rows readable, int64 [row]; then go on with all the others in the background.

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered, or holds no data where a row should be.
        """
        if self.is_whole:
            return
        chunks = rows // self._chunk_rows
        self._wait_for(distinct(chunks[~self._is_filled[chunks]]).tolist())
        self._fill_behind()

    def fill_all(self) -> None:
        """Make all rows readable.

        Raises
        ------
        CorruptCacheError
            As `fill`.
        """
        if self.is_whole:
            return
        self._reader.check_shards()  # a cache whose shards are missing must not cost the memory of a whole one
        self._wait_for(np.flatnonzero(~self._is_filled).tolist())
        self._finish()
        self._pool.shutdown(wait=True)

    def renew(self) -> None:
        """Have threads of this process, which was forked; the others stayed behind."""
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        num_threads = _FETCHING_THREADS if self._reader.is_far else DECODING_THREADS
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kdcache-resident")
        self._pending: dict[int, Future[None]] = {}
        self._is_filling_behind = False
        # No finaliser shuts the pool down: one that runs within its `submit` would wait for itself. Its threads end by
        # themselves when nobody holds it any more.

    def _wait_for(self, chunks: Sequence[int]) -> None:
        futures = [future for together in self._parted(chunks) for future in self._submitted(together).values()]
        for future in futures:
            try:
                future.result()
            except Exception:
                with self._lock:  # whoever asks again has it tried again
                    self._pending = {other: waited for other, waited in self._pending.items() if waited is not future}
                raise

    def _parted(self, chunks: Sequence[int]) -> list[list[int]]:
        """Part chunks by what is read together: one by one, so that all threads decode; far away by their shards."""
        if not self._reader.is_far:
            return [[chunk] for chunk in chunks]
        groups: dict[int, list[int]] = {}
        for chunk in chunks:
            groups.setdefault(chunk // self._reader.spec.num_chunks, []).append(chunk)
        return list(groups.values())

    def _submitted(self, chunks: Sequence[int]) -> dict[int, Future[None]]:
        """Have chunks decoded, but those that are being decoded: twice at a time, one would write where another reads.

        Gives what to wait for, by chunk.
        """
        with self._lock:
            new = [chunk for chunk in chunks if chunk not in self._pending and not self._is_filled[chunk]]
            if new:
                self._pending.update(dict.fromkeys(new, self._pool.submit(self._decode, new)))
            return {chunk: self._pending.get(chunk) or _done() for chunk in chunks}

    def _decode(self, chunks: Sequence[int]) -> None:
        self._reader.read_chunks(chunks, self.codes)
        self._is_filled[chunks] = True
        if self._is_filled.all():  # whichever comes last: a chunk that was waited for, or one that was filled behind
            self._finish()

    def _fill_behind(self) -> None:
        with self._lock:
            if not (self._is_filling_behind or self.is_whole):
                self._is_filling_behind = True
                self._pool.submit(_fill_next, weakref.ref(self), 0)

    def fill_piece(self, first_chunk: int) -> int | None:
        """Decode a few chunks from one on, and give the one to go on with; None where that was the last."""
        if self._reader.is_far and not first_chunk:
            self._prepare()
        num_chunks = self._reader.spec.num_chunks if self._reader.is_far else _PIECE_CHUNKS
        last = min(first_chunk + num_chunks, len(self._is_filled))
        for chunks in self._parted((first_chunk + np.flatnonzero(~self._is_filled[first_chunk:last])).tolist()):
            future = Future[None]()
            with self._lock:
                new = [chunk for chunk in chunks if chunk not in self._pending and not self._is_filled[chunk]]
                self._pending.update(dict.fromkeys(new, future))
            if new:
                self._settle(future, new)
        return last if last < len(self._is_filled) else None

    def _prepare(self) -> None:
        with contextlib.suppress(KdcacheError):  # raised again for whoever asks for the rows
            self._reader.prepare()

    def _settle(self, future: Future[None], chunks: Sequence[int]) -> None:
        try:
            self._decode(chunks)
        except Exception as error:  # noqa: BLE001 - whoever asks for the chunk's rows gets it
            future.set_exception(error)
        else:
            future.set_result(None)

    def _finish(self) -> None:
        with self._lock:
            self.is_whole = True
            self._pending.clear()
            self._pool.shutdown(wait=False)


def _done() -> Future[None]:
    future = Future[None]()
    future.set_result(None)
    return future


def _fill_next(resident: weakref.ref[ResidentCodes], first_chunk: int) -> None:
    """Fill a piece and come again behind what was submitted meanwhile; end with the codes or with the program."""
    codes = resident()
    if codes is None:
        return
    following = codes.fill_piece(first_chunk)
    pool = codes._pool  # noqa: SLF001 - its own kind
    del codes
    if following is not None:
        try:
            pool.submit(_fill_next, resident, following)
        except RuntimeError:  # the pool, or the program, has ended
            return
