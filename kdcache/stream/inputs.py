"""Reading the students' inputs: in this process, or in worker processes that know nothing of the cache.

A worker is asked for the inputs of a batch and for digests of some of them. The cache is read in the process that
trains, so that workers may be forked, spawned, kept or lost. They are those of `concurrent.futures`, with torch's
pickling, which passes tensors through shared memory without a name: nothing is left behind when a process is killed.
"""

from __future__ import annotations

__all__ = ["InputBatch", "InputReader"]

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing  # registers how tensors are pickled

from kdcache.errors import OptionError, WorkerError
from kdcache.store.locks import OwnLock
from kdcache.transfer_set import TransferSet

_SEED_BYTES = 8
_WATCH_SECONDS = 1.0


class InputBatch(NamedTuple):
    """Inputs as their set collates them, and digests of the checked ones."""

    inputs: Any
    digests: list[bytes]


@dataclass(frozen=True, eq=False)
class _Reading:
    """The inputs and how they are read; what a worker is given once."""

    inputs: TransferSet
    view_index: int

    def read(self, indices: np.ndarray, checked: np.ndarray) -> InputBatch:
        inputs = self.inputs.read_inputs(indices, view_index=self.view_index)  # first: digests may draw as well
        return InputBatch(inputs, self.inputs.digests_of(checked))


class InputReader:
    """Reads batches of inputs.

    Parameters
    ----------
    inputs : TransferSet
    view_index : int
    num_workers : int
        Processes that read; 0 reads in the thread that asks.
    start_method : {"fork", "spawn", "forkserver"}, optional
        How workers are started; Python's default where absent.
    worker_init : callable () -> None, optional
        Run once in every worker.

    Raises
    ------
    OptionError
        `num_workers` is negative, or this system has no such start method.
    """

    def __init__(
        self,
        inputs: TransferSet,
        *,
        view_index: int,
        num_workers: int = 0,
        start_method: str | None = None,
        worker_init: Callable[[], None] | None = None,
    ) -> None:
        if num_workers < 0:
            raise OptionError(f"num_workers is {num_workers}; 0 reads in this process")
        methods = multiprocessing.get_all_start_methods()
        if start_method is not None and start_method not in methods:
            raise OptionError(f"start_method is {start_method!r}; this system has {methods}")
        self.num_workers = num_workers
        self._reading = _Reading(inputs, view_index)
        self._start_method = start_method
        self._worker_init = worker_init
        self._pool: ProcessPoolExecutor | None = None
        self._turn = OwnLock()

    def start(self) -> None:
        """Start the workers, from this thread, unless they run; they are kept until `close`."""
        if self._pool is not None and any(not process.is_alive() for process in _processes(self._pool)):
            self.close()
        if self.num_workers == 0 or self._pool is not None:
            return
        self._pool = ProcessPoolExecutor(
            self.num_workers,
            mp_context=multiprocessing.get_context(self._start_method),
            initializer=_begin,
            initargs=(self._reading, self._worker_init),
        )
        # No finaliser: a pool that nobody holds any more ends its workers by itself.
        self._pool.submit(_nothing)  # starts them

    def request(self, indices: np.ndarray, checked: np.ndarray, *, seed: tuple[int, ...]) -> Callable[[], InputBatch]:
        """Ask for a batch; workers begin with it now, and without them it is read when the answer is called for.

        Parameters
        ----------
        indices : ndarray [example] of int64
            Positions in the inputs.
        checked : ndarray [checked] of int64
            Of these digests are wanted.
        seed : tuple of int
            Seeds all that a worker draws for this batch, so that it does not depend on who reads it.

        Returns
        -------
        callable () -> InputBatch
            Waits for the answer. Raises what reading raised; WorkerError where a worker died.
        """
        if self.num_workers == 0:
            return lambda: self._read_here(indices, checked)
        if self._pool is None:
            raise _closed()
        try:
            future = self._pool.submit(_read, indices, checked, "|".join(map(str, seed)))
        except BrokenProcessPool as error:
            raise self._lost(self._pool, error) from error
        return _Answer(future, self, self._pool)

    def _read_here(self, indices: np.ndarray, checked: np.ndarray) -> InputBatch:
        with self._turn:  # an epoch that was left may be at its last batch yet, and a dataset is for one at a time
            return self._reading.read(indices, checked)

    def forget(self, answers: Iterable[Callable[[], InputBatch]]) -> None:
        """Let workers leave what nobody waits for any more."""
        for answer in answers:
            if isinstance(answer, _Answer):
                answer.future.cancel()

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _lost(self, pool: ProcessPoolExecutor, error: BrokenProcessPool) -> WorkerError:
        if self._pool is pool:  # the next epoch starts others
            self._pool = None
        return WorkerError(
            f"the {self.num_workers} worker(s) that read inputs are lost ({error}): one was killed, perhaps for want "
            "of memory or by a fault in the dataset's own code, or worker_init failed. No batch was skipped: "
            "state_dict() still says where training stands. Try fewer workers, or num_workers=0, which shows where a "
            "dataset fails; then go on with load_state_dict"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


@dataclass(frozen=True, eq=False)
class _Answer:
    future: Future[InputBatch]
    reader: InputReader
    pool: ProcessPoolExecutor

    def __call__(self) -> InputBatch:
        try:
            return self.future.result()
        except BrokenProcessPool as error:
            raise self.reader._lost(self.pool, error) from error  # noqa: SLF001 - its own kind
        except CancelledError as error:
            raise _closed() from error


def _closed() -> WorkerError:
    return WorkerError(
        "the workers that read inputs were closed while an iteration went on, so that its next batch has none. No "
        "batch was skipped; begin another iteration, which starts others"
    )


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())  # noqa: SLF001 - a pool does not say whether its workers live


_mine: list[_Reading] = []
"""In a worker: what it reads."""


def _begin(reading: _Reading, worker_init: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the program's to answer; it goes to all processes
    torch.set_num_threads(1)  # the processes share the processor's cores already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine[:] = [reading]
    if worker_init is not None:
        worker_init()


def _end_with_parent() -> None:
    """End this process when the one that trains is gone, however it went: nothing else would tell it."""
    parent, parent_pid = multiprocessing.parent_process(), os.getppid()
    while parent is not None and parent.is_alive() and os.getppid() == parent_pid:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _nothing() -> None:
    """Do nothing."""


def _read(indices: np.ndarray, checked: np.ndarray, seed: str) -> InputBatch:
    digest = hashlib.blake2b(seed.encode(), digest_size=_SEED_BYTES).digest()
    number = int.from_bytes(digest, "little")
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - what datasets may draw from
    torch.manual_seed(number)
    return _mine[0].read(indices, checked)
