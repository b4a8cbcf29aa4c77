"""SoftTargetLoader: batches of (inputs, labels, soft targets), joined by example_id."""

from __future__ import annotations

__all__ = ["SoftTargetLoader"]

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import SoftTargetCache
from kdcache.errors import InputMismatchError, ShapeError, TransferSetError, UnknownExampleError
from kdcache.soft_targets import SoftTargets
from kdcache.stream.order import epoch_order
from kdcache.transfer_set import TransferSet

RESIDENT_BYTES = 2**31
"""Coded rows up to this size are held in memory."""
LOOK_AHEAD = 2
"""Batches made ahead of use."""

Batch = tuple[Any, Tensor | None, SoftTargets]


class SoftTargetLoader:
    """Streams (inputs, labels, soft targets) batches in a deterministic global shuffle.

    Each epoch's order is a pure function of (seed, epoch). Inputs and soft targets are joined by example_id. All
    labels, the whole first batch of every epoch and one example of every further batch are held against what the cache
    keeps of the inputs that the teachers saw, so that training on changed or reordered inputs is an error.

    Parameters
    ----------
    cache : SoftTargetCache
    inputs : TransferSet or map-style dataset
        The students' inputs. A plain dataset's ids are its positions; wrap it in a TransferSet to name them.
    batch_size : int
    seed : int
        Of the shuffle.
    shuffle : bool
        Else in the transfer set's order.
    example_ids : sequence of int or str, optional
        Train on these examples alone; all of `inputs` where absent.
    drop_last : bool
        Leave out a last batch that is smaller.
    view_index : int
        The view of inputs and soft targets.
    teachers : sequence of str, optional
        Read only these teachers.
    max_resident_bytes : int
        A cache whose coded rows take no more is held in memory; a larger one is read chunk by chunk.

    Raises
    ------
    UnknownExampleError
        An example of `inputs` is not in the cache.
    ShapeError
        An example has another number of rows than in the cache.
    InputMismatchError
        The inputs have other views than the cache; while iterating: an input is not the one that the teachers saw.

    Examples
    --------
    >>> import tempfile, torch, kdcache
    >>> examples = kdcache.TransferSet.from_arrays(torch.randn(10, 4), labels=[0, 1] * 5)
    >>> cache = kdcache.build_cache(tempfile.mkdtemp() + "/cache", examples, {"a": torch.nn.Linear(4, 2)})
    >>> loader = kdcache.SoftTargetLoader(cache, examples, batch_size=4, seed=0)
    >>> [len(soft_targets) for inputs, labels, soft_targets in loader]
    [4, 4, 2]
    """

    def __init__(
        self,
        cache: SoftTargetCache,
        inputs: TransferSet | Any,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        example_ids: Sequence[int] | Sequence[str] | np.ndarray | None = None,
        drop_last: bool = False,
        view_index: int = 0,
        teachers: Sequence[str] | None = None,
        max_resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        if batch_size < 1:
            raise ShapeError(f"batch_size is {batch_size}; at least 1 is needed")
        self.cache = cache
        self.inputs = inputs if isinstance(inputs, TransferSet) else TransferSet(inputs)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.view_index = view_index
        self._teachers = teachers
        self._indices = (
            np.arange(len(self.inputs)) if example_ids is None else self.inputs.indices_of(np.asarray(example_ids))
        )
        if len(self._indices) == 0:
            raise TransferSetError("there are no examples to train on: example_ids is empty")
        self._check_views()
        self._first_row, self._num_rows = self._join()
        self._has_single_rows = bool((self._num_rows[self._indices] == 1).all())
        self._check_labels()
        self._labels = None if self.inputs.labels is None else torch.from_numpy(self.inputs.labels)
        self._epoch, self._start = 0, 0  # what the next iteration gives
        self._position = (0, 0)  # behind the batch given last
        if cache.coded_bytes(teachers=teachers) <= max_resident_bytes and cache.complete is not None:
            cache.hold_in_memory(teachers=teachers)

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        full, rest = divmod(len(self._indices), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its first batch."""
        self._epoch, self._start = epoch, 0
        self._position = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Give the position behind the batch given last, and what it is a position in."""
        epoch, next_batch = self._position
        return {**self._order(), "epoch": epoch, "next_batch": next_batch}

    def _order(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "batch_size": self.batch_size,
            "num_examples": len(self._indices),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken; the next iteration gives the rest of that epoch.

        Raises
        ------
        TransferSetError
            The state is of a loader that gives other batches: seed, batch size or number of examples differ.
        """
        other = {key: state.get(key) for key, ours in self._order().items() if state.get(key) != ours}
        if other:
            raise TransferSetError(
                f"the state is of a loader with {other}, this one has {self._order()}: examples would be lost or "
                "repeated. Make the loader with the same arguments"
            )
        self._epoch, self._start = state["epoch"], state["next_batch"]
        self._position = (self._epoch, self._start)

    def __iter__(self) -> Iterator[Batch]:
        """Give a whole epoch, or after `load_state_dict` the rest of one; the next iteration gives the next epoch.

        An iteration that is left before its end does not count: the next one gives the same epoch from its start.
        """
        epoch, start, self._start = self._epoch, self._start, 0
        remaining = self._batches(epoch)[start:]
        if remaining:
            self._check_inputs(remaining[0])
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-loader") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for next_batch, indices in enumerate(remaining, start=start + 1 - LOOK_AHEAD):
                    waiting.append(pool.submit(self._make, indices))
                    if len(waiting) > LOOK_AHEAD:
                        yield self._taken(waiting, (epoch, next_batch))
                while waiting:
                    yield self._taken(waiting, (epoch, start + len(remaining) + 1 - len(waiting)))
            finally:
                for future in waiting:
                    future.cancel()
        self._epoch = epoch + 1
        self._position = (self._epoch, 0)

    def _taken(self, waiting: deque[Future[Batch]], position: tuple[int, int]) -> Batch:
        batch = waiting.popleft().result()
        self._position = position
        return batch

    def _batches(self, epoch: int) -> list[np.ndarray]:
        count = len(self._indices)
        order = epoch_order(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
        return [
            self._indices[order[start : start + self.batch_size]]
            for start in range(0, len(self) * self.batch_size, self.batch_size)
        ]

    def _make(self, indices: np.ndarray) -> Batch:
        self._check_inputs(indices[[int(indices[0]) % len(indices)]])
        inputs = self.inputs.read_inputs(indices, view_index=self.view_index)
        labels = None if self._labels is None else self._labels[torch.from_numpy(indices)]
        return inputs, labels, self._soft_targets(indices)

    def _soft_targets(self, indices: np.ndarray) -> SoftTargets:
        first_row, num_rows = self._first_row[indices], self._num_rows[indices]
        if self._has_single_rows:
            return self.cache.read_rows(first_row, teachers=self._teachers)
        rows = np.concatenate(
            [np.arange(first, first + count) for first, count in zip(first_row, num_rows, strict=True)]
        )
        read = self.cache.read_rows(rows, teachers=self._teachers)
        return replace(read, num_rows=torch.from_numpy(num_rows))

    def _join(self) -> tuple[np.ndarray, np.ndarray]:
        """Find every example's rows by its id, once: first row int64 [example] and number of rows int32 [example]."""
        first_row = np.full(len(self.inputs), -1, np.int64)
        num_rows = np.zeros(len(self.inputs), np.int32)
        ids = self.inputs.example_ids[self._indices]
        try:
            first_row[self._indices], num_rows[self._indices] = self.cache.locate(ids, view_index=self.view_index)
        except UnknownExampleError as error:
            raise UnknownExampleError(
                f"the inputs' ids are not those cache {self.cache.address} was built with: give them, TransferSet("
                f"dataset, example_ids=...). The inputs have {len(self.inputs)} examples, the cache "
                f"{self.cache.num_examples}. {error}"
            ) from error
        differ = self._indices[num_rows[self._indices] != self.inputs.num_rows[self._indices]]
        if len(differ):
            index = int(differ[0])
            raise ShapeError(
                f"example {self.inputs.example_id(index)!r} has {self.inputs.num_rows[index]} row(s) by the inputs and "
                f"{num_rows[index]} in cache {self.cache.address}; give TransferSet(num_rows=...) as when it was built"
            )
        return first_row, num_rows

    def _check_views(self) -> None:
        kept = self.cache.document.view
        views = self.inputs.views
        ours = None if views is None else (views.name, views.seed)
        theirs = None if kept is None else (kept.name, kept.seed)
        if ours != theirs:
            raise InputMismatchError(
                f"the inputs have {_views_in_words(ours)}, the teachers of cache {self.cache.address} saw "
                f"{_views_in_words(theirs)}: the soft targets would be those of other inputs. Give the TransferSet the "
                "views that the cache was built with, or none where it was built without"
            )

    def _check_labels(self) -> None:
        ours, theirs = self.inputs.labels, self.cache.labels
        if ours is None or theirs is None:
            return
        examples = self._example_of_row(self._first_row[self._indices] % self.cache.document.padded_rows)
        differ = self._indices[ours[self._indices] != theirs[examples]]
        if len(differ):
            index = int(differ[0])
            raise InputMismatchError(
                f"{len(differ)} label(s) differ from those cache {self.cache.address} was built with: example "
                f"{self.inputs.example_id(index)!r} now has {ours[index]}. Give the transfer set the cache was built "
                "from, or build a cache from this one"
            )

    def _check_inputs(self, indices: np.ndarray) -> None:
        examples = self._example_of_row(self._first_row[indices] % self.cache.document.padded_rows)
        digests = self.cache.input_digests_of(examples)
        if digests is None:
            return
        for index, digest in zip(indices.tolist(), digests, strict=True):
            if self.inputs.digest_of(index) != digest.tobytes():
                raise InputMismatchError(
                    f"example {self.inputs.example_id(index)!r} (position {index} of the inputs) is not the input "
                    f"that the teachers of cache {self.cache.address} saw: its digest differs. Its soft targets would "
                    "be wrong. Give the dataset the cache was built from, before any augmentation, under the same ids"
                )

    def _example_of_row(self, first_rows: np.ndarray) -> np.ndarray:
        if self.cache.document.num_rows == self.cache.document.num_examples:
            return first_rows
        return np.searchsorted(self.cache.first_rows, first_rows)


def _views_in_words(views: tuple[str, int] | None) -> str:
    return "no views" if views is None else f"views {views[0]!r} with seed {views[1]}"
