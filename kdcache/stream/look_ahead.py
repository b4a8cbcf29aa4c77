"""Look-ahead: reading soft targets from the moment a sampler hands out which examples come next.

What a sampler hands out are *announced* positions in the dataset. They are a hint and nothing more: when the batch
arrives its own ids decide, and what was read for others is thrown away.
"""

from __future__ import annotations

__all__ = ["AnnouncingBatchSampler", "LookAhead", "announcing_copy", "ids_by_position"]

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, Subset

from kdcache.errors import KdcacheError, OptionError, TransferSetError
from kdcache.store.ids import normal_ids
from kdcache.threads import LoopThreads

Read = TypeVar("Read")


class _Announced(NamedTuple):
    ids: np.ndarray
    reading: Future[Any]


class LookAhead(Generic[Read]):
    """Reads what is announced, on one thread; as many batches wait as were announced and have not arrived.

    Parameters
    ----------
    ids : ndarray [example] of int64 or object
        The id at each position of the dataset.
    read : callable (positions) -> what is read
        Called in the thread, with positions in the dataset.
    """

    def __init__(self, ids: np.ndarray, read: Callable[[np.ndarray], Read]) -> None:
        self._ids = ids
        self._read = read
        self._waiting: deque[_Announced | None] = deque()
        self._threads = LoopThreads(1, "kdcache-join")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, and forget what it read."""
        self._waiting.clear()
        self._threads.leave()

    def announce(self, indices: Any) -> None:
        """Begin to read what stands at some positions, or note that a batch comes of which nothing is known."""
        positions = self._positions(indices)
        if positions is None:
            self._waiting.append(None)
        else:
            self._waiting.append(_Announced(self._ids[positions], self._threads.submit(self._read, positions)))

    def take(self, ids: np.ndarray) -> Read | None:
        """Give what was read for exactly these ids, in this order; None where it was not.

        One announcement is used up either way: that of these ids, or else the oldest.
        """
        for place, announced in enumerate(self._waiting):
            if announced is not None and np.array_equal(announced.ids, ids):
                del self._waiting[place]
                return _read_or_none(announced.reading)
        oldest = self._waiting.popleft() if self._waiting else None
        if oldest is not None:
            oldest.reading.cancel()
        return None

    def _positions(self, indices: Any) -> np.ndarray | None:
        """Give positions as an array; None of what are no positions in the dataset, which a sampler may well give."""
        try:
            positions = np.asarray(indices)
        except (TypeError, ValueError, RuntimeError):
            return None
        if positions.ndim != 1 or positions.dtype.kind not in "iu" or not len(positions):
            return None
        if int(positions.min()) < -len(self._ids) or int(positions.max()) >= len(self._ids):
            return None
        return positions


def _read_or_none(reading: Future[Any]) -> Any | None:
    """Give what was read; None after an error of ours, which comes again with a better message when read in turn."""
    try:
        return reading.result()
    except KdcacheError:
        return None


def _announced(batches: Iterator[Any], listener: LookAhead[Any]) -> Iterator[Any]:
    for indices in batches:
        listener.announce(indices)
        yield indices


class AnnouncingBatchSampler:
    """A batch sampler that tells a look-ahead what it hands out; in all else the one it wraps.

    Parameters
    ----------
    batch_sampler : iterable of lists of positions

    Attributes
    ----------
    listener : LookAhead or None
        What iterations tell that begin while it stands here.
    """

    def __init__(self, batch_sampler: Iterable[Any]) -> None:
        self._batch_sampler = batch_sampler
        self.listener: LookAhead[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Begin the wrapped sampler at once, so that its random numbers are drawn when they would be without this."""
        batches = iter(self._batch_sampler)
        return batches if self.listener is None else _announced(batches, self.listener)

    def __len__(self) -> int:
        return len(self._batch_sampler)  # type: ignore[arg-type]  # its own TypeError where it has no length

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_batch_sampler"], name)


def announcing_copy(loader: DataLoader[Any]) -> tuple[DataLoader[Any], AnnouncingBatchSampler]:
    """Give a shallow copy of a loader whose batch sampler announces; the loader itself is not touched.

    Dataset, sampler, generator and collation are the loader's own. The copy has workers of its own.
    """
    announcing = copy.copy(loader)
    sampler = AnnouncingBatchSampler(loader.batch_sampler or ())
    object.__setattr__(announcing, "batch_sampler", sampler)  # a DataLoader refuses the assignment once it is made
    object.__setattr__(announcing, "_iterator", None)
    return announcing, sampler


def ids_by_position(loader: Any, example_ids: Any | None) -> np.ndarray | None:
    """Give the id at every position of a loader's dataset, or None where the loader cannot be looked ahead of.

    Parameters
    ----------
    loader : iterable
        Looked ahead of if it is exactly a torch DataLoader over a map-style dataset with a batch sampler: subclasses
        may hand out other things, or keep a state that reading on would disturb.
    example_ids : sequence of int or str, optional
        The ids; else the dataset's own attribute `example_ids`, also behind `torch.utils.data.Subset`.

    Raises
    ------
    OptionError
        Ids were given that cannot be used: for another kind of loader, or another number than there are examples.
    TransferSetError
        What was given are no ids.
    """
    is_known = type(loader) is DataLoader and loader.batch_sampler is not None
    if not is_known or isinstance(loader.dataset, IterableDataset):
        if example_ids is not None:
            raise OptionError(
                "example_ids serve to read ahead of a torch.utils.data.DataLoader over a map-style dataset with a "
                f"batch sampler, and the loader is a {type(loader).__module__}.{type(loader).__qualname__} without "
                "that. Leave example_ids out: the ids in the batches are enough"
            )
        return None
    if example_ids is None:
        return _ids_of_dataset(loader.dataset)
    ids = _normal(example_ids)
    if len(ids) != len(loader.dataset):
        raise OptionError(
            f"example_ids has {len(ids)} ids for a dataset of {len(loader.dataset)} examples; give the id at every "
            "position of the loader's dataset, in its order, or leave them out"
        )
    return ids


def _ids_of_dataset(dataset: Any) -> np.ndarray | None:
    if type(dataset) is Subset:
        ids = _ids_of_dataset(dataset.dataset)
        return None if ids is None else ids[np.asarray(dataset.indices)]
    values = getattr(dataset, "example_ids", None)
    is_list = hasattr(values, "__array__") or isinstance(values, Sequence)
    if not is_list or len(values) != len(dataset):  # type: ignore[arg-type]  # lists and arrays have a length
        return None
    try:
        return _normal(values)
    except TransferSetError:  # an attribute that happens to have this name
        return None


def _normal(values: Any) -> np.ndarray:
    """Give ids as an array of their own: they may be changed in place while what was found by them is remembered."""
    return normal_ids(
        values if hasattr(values, "__array__") or isinstance(values, list | tuple) else list(values)
    ).copy()
