"""Reading the students' inputs: in this process, or in worker processes that know nothing of the cache.

Workers are those of torch's DataLoader, one batch a request; they are asked for inputs and, of some of them, digests.
The cache is read in the process that trains, so that workers may be forked, spawned, kept or lost.
"""

from __future__ import annotations

__all__ = ["InputBatch", "InputReader", "Request"]

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kdcache.errors import OptionError
from kdcache.transfer_set import TransferSet


class Request(NamedTuple):
    """What is asked of a reader: a batch, and of which of its inputs digests are wanted."""

    indices: np.ndarray
    """int64 [example], positions in the inputs."""
    checked: np.ndarray
    """int64 [checked], positions in the inputs."""


class InputBatch(NamedTuple):
    """Inputs as their set collates them, and digests of the checked ones; None where the set keeps none."""

    inputs: Any
    digests: list[bytes] | None


class InputReader:
    """Reads batches of inputs in the order in which they are asked for.

    Parameters
    ----------
    inputs : TransferSet
    view_index : int
    num_workers : int
        Processes that read; 0 reads in the calling thread.
    persistent_workers : bool
        Keep the processes from epoch to epoch.
    prefetch_batches : int
        Batches that each worker has under way.
    multiprocessing_context : str, optional
        "fork", "spawn" or "forkserver"; torch's default where absent.

    Raises
    ------
    OptionError
        `num_workers` is negative, or the context is none.
    """

    def __init__(
        self,
        inputs: TransferSet,
        *,
        view_index: int,
        num_workers: int = 0,
        persistent_workers: bool = True,
        prefetch_batches: int = 2,
        multiprocessing_context: str | None = None,
    ) -> None:
        if num_workers < 0:
            raise OptionError(f"num_workers is {num_workers}; 0 reads in this process")
        if multiprocessing_context not in {None, *torch.multiprocessing.get_all_start_methods()}:
            raise OptionError(
                f"multiprocessing_context is {multiprocessing_context!r}; this system has "
                f"{torch.multiprocessing.get_all_start_methods()}"
            )
        self._requested = _Requested(inputs, view_index)
        self._num_workers = num_workers
        self._persistent_workers = persistent_workers and num_workers > 0
        self._prefetch_batches = prefetch_batches
        self._multiprocessing_context = multiprocessing_context
        self._kept: _Workers | None = None

    @property
    def has_workers(self) -> bool:
        """Whether processes read; what they read is to be taken in the thread that asked for it."""
        return self._num_workers > 0

    def read(self, requests: Iterable[Request]) -> Generator[InputBatch]:
        """Answer requests one by one, in their order; workers are asked ahead."""
        if self._num_workers == 0:
            return (self._requested.read(request) for request in requests)
        if not self._persistent_workers or (self._kept is not None and self._kept.is_busy):
            return self._start(persistent_workers=False).read(requests)
        if self._kept is None:
            self._kept = self._start(persistent_workers=True)
        return self._kept.read(requests)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _start(self, *, persistent_workers: bool) -> _Workers:
        return _Workers(
            self._requested,
            num_workers=self._num_workers,
            persistent_workers=persistent_workers,
            prefetch_factor=self._prefetch_batches,
            multiprocessing_context=self._multiprocessing_context,
        )


@dataclass(frozen=True, eq=False)
class _Requested(Dataset[InputBatch]):
    """The inputs as a dataset whose index is a request."""

    inputs: TransferSet
    view_index: int

    def read(self, request: Request) -> InputBatch:
        digests = [self.inputs.digest_of(int(index)) for index in request.checked] if len(request.checked) else None
        return InputBatch(self.inputs.read_inputs(request.indices, view_index=self.view_index), digests)

    def __getitems__(self, request: Request) -> InputBatch:
        return self.read(request)

    def __getitem__(self, index: int) -> InputBatch:
        return self.read(Request(np.array([index]), np.array([], np.int64)))

    def __len__(self) -> int:
        return len(self.inputs)


class _Workers:
    """A DataLoader whose batch sampler are the requests of the moment."""

    def __init__(self, requested: _Requested, **options: Any) -> None:
        self._requests: Iterable[Request] = ()
        self.is_busy = False
        self._loader: DataLoader[InputBatch] = DataLoader(
            requested,
            batch_sampler=self,  # type: ignore[arg-type] # its indexes are requests
            collate_fn=_as_it_is,  # type: ignore[arg-type] # a request gives one batch, no list of examples
            generator=torch.Generator(),  # workers' seeds are not drawn from the one that trains a student
            **options,
        )

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def read(self, requests: Iterable[Request]) -> Generator[InputBatch]:
        self._requests = requests
        self.is_busy = True
        return self._answers(iter(self._loader))  # starts the workers now, from this thread

    def _answers(self, answers: Iterator[InputBatch]) -> Generator[InputBatch]:
        try:
            yield from answers
        finally:
            self.is_busy = False


def _as_it_is(batch: InputBatch) -> InputBatch:
    return batch
