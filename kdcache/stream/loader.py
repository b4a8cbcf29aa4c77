"""SoftTargetLoader: batches of (inputs, labels, soft targets), joined by example_id."""

from __future__ import annotations

__all__ = ["SoftTargetLoader"]

import functools
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import SoftTargetCache
from kdcache.errors import OptionError, TransferSetError
from kdcache.soft_targets import SoftTargets
from kdcache.stream.batches import GlobalBatches, Topology
from kdcache.stream.joined import JoinedExamples
from kdcache.stream.order import Order, SequentialOrder, ShuffledOrder, WindowedOrder
from kdcache.stream.transfer import DeviceTransfer
from kdcache.transfer_set import TransferSet

RESIDENT_BYTES = 2**31
"""Coded rows up to this size are held in memory, and shuffled as a whole."""

Batch = tuple[Any, Tensor | None, SoftTargets]
Shuffle = bool | Literal["windowed"]

_ORDER_POSITIONS = 2**14
"""Positions whose examples are found at a time: one by one, calls would cost more than what they do."""


class SoftTargetLoader:
    """Streams (inputs, labels, soft targets) batches in a deterministic global shuffle.

    Each epoch's order is a pure function of (seed, epoch), and of nothing else: the sequence of global batches is the
    same for every world size. Inputs and soft targets are joined by example_id. All labels, the
    whole first batch of every epoch and one example of every further batch are held against what the cache keeps of
    the inputs that the teachers saw, so that training on changed or reordered inputs is an error.

    Parameters
    ----------
    cache : SoftTargetCache
    inputs : TransferSet or map-style dataset
        The students' inputs. A plain dataset's ids are its positions; wrap it in a TransferSet to name them.
    batch_size : int
        Examples of a step, of all ranks together.
    seed : int
        Of the shuffle.
    shuffle : bool or "windowed"
        True draws a permutation of all examples; "windowed" one of shards and, within windows of a few shards, of
        their examples, so that the cache is read shard by shard. False keeps the transfer set's order. By default a
        cache is shuffled whole where its coded rows take no more than `max_resident_bytes`, else windowed.
    example_ids : sequence of int or str, optional
        Train on these examples alone; all of `inputs` where absent.
    drop_last : bool
        Leave out a last batch that is smaller.
    view_index : int
        The view of inputs and soft targets.
    teachers : sequence of str, optional
        Read only these teachers.
    rank, world_size : int, optional
        This process among those that train together. Those of torch.distributed where it is initialised when an
        iteration begins; else one process alone. Every rank gets a contiguous part of each global batch, and equally
        many batches.
    prefetch_batches : int
        Batches made ahead of use.
    device : str, optional
        Where batches are copied, ahead of use: inputs, labels and soft targets, which stay coded.
    max_resident_bytes : int
        A cache whose coded rows take no more is held in memory; a larger one is read chunk by chunk.
    window_shards : int, optional
        Shards of a window of a windowed shuffle. By default as many as a quarter of `max_resident_bytes` holds.

    Raises
    ------
    UnknownExampleError
        An example of `inputs` is not in the cache.
    ShapeError
        An example has another number of rows than in the cache; a batch has fewer examples than there are ranks.
    InputMismatchError
        The inputs have other views or labels than the cache; while iterating: an input is not the one that the teachers
        saw.
    OptionError
        An option has a value out of its range.

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
        shuffle: Shuffle | None = None,
        example_ids: Sequence[int] | Sequence[str] | np.ndarray | None = None,
        drop_last: bool = False,
        view_index: int = 0,
        teachers: Sequence[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch_batches: int = 2,
        device: str | None = None,
        max_resident_bytes: int = RESIDENT_BYTES,
        window_shards: int | None = None,
    ) -> None:
        if prefetch_batches < 1:
            raise OptionError(f"prefetch_batches is {prefetch_batches}; at least 1 is needed")
        self.cache = cache
        self.inputs = inputs if isinstance(inputs, TransferSet) else TransferSet(inputs)
        self._joined = JoinedExamples(cache, self.inputs, example_ids=example_ids, view_index=view_index)
        self._epochs = _Epochs.of(
            self._joined, seed=seed, shuffle=shuffle, teachers=teachers,
            max_resident_bytes=max_resident_bytes, window_shards=window_shards,
        )  # fmt: skip
        self._batches = GlobalBatches(self._epochs.num_examples, batch_size, drop_last)
        self._topology = (rank, world_size)
        self._batches.check_parts(Topology.current(rank, world_size))
        self._prefetch_batches = prefetch_batches
        self._labels = None if self.inputs.labels is None else torch.from_numpy(self.inputs.labels)
        self._transfer = DeviceTransfer(device)
        self._teachers = teachers
        self._is_resident = cache.complete is not None and cache.coded_bytes(teachers=teachers) <= max_resident_bytes
        if self._is_resident:
            cache.hold_in_memory(teachers=teachers)
        self._epoch, self._start = 0, 0  # what the next iteration gives
        self._position = (0, 0)  # behind the batch given last

    def __len__(self) -> int:
        """Count the batches of an epoch, on every rank."""
        return len(self._batches)

    @property
    def batch_size(self) -> int:
        """Examples of a step, of all ranks together."""
        return self._batches.batch_size

    @property
    def seed(self) -> int:
        """Seed of the shuffle."""
        return self._epochs.seed

    @property
    def tier(self) -> str:
        """Where coded rows are read from: "memory" or "shards"."""
        return "memory" if self._is_resident else "shards"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its first batch."""
        self._epoch, self._start = epoch, 0
        self._position = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Give the position behind the batch given last, and what it is a position in.

        The same on every rank, and good for any number of ranks.
        """
        epoch, next_batch = self._position
        return {**self._order_state(), "epoch": epoch, "next_batch": next_batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken; the next iteration gives the rest of that epoch.

        Raises
        ------
        TransferSetError
            The state is of a loader that gives other batches: seed, shuffle, batch size, view or examples differ.
        """
        ours = self._order_state()
        other = {key: state.get(key) for key, value in ours.items() if state.get(key) != value}
        if other:
            raise TransferSetError(
                f"the state is of a loader with {other}, this one has {ours}: examples would be lost or repeated. Make "
                "the loader with the same arguments"
            )
        self._epoch, self._start = state["epoch"], state["next_batch"]
        self._position = (self._epoch, self._start)

    def _order_state(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "shuffle": int(self._epochs.is_shuffled),
            "window_shards": self._epochs.window_shards or 0,
            "batch_size": self.batch_size,
            "num_examples": self._batches.num_examples,
            "examples": self._epochs.digest,
        }

    def __iter__(self) -> Iterator[Batch]:
        """Give a whole epoch, or after `load_state_dict` the rest of one; the next iteration gives the next epoch.

        An iteration that is left before its end does not count: the next one gives the same epoch from its start.
        """
        epoch, start, self._start = self._epoch, self._start, 0
        topology = Topology.current(*self._topology)
        self._batches.check_parts(topology)
        for number, batch in enumerate(self._made_ahead(epoch, start, topology), start=start + 1):
            self._position = (epoch, number)
            yield batch
        self._epoch = epoch + 1
        self._position = (self._epoch, 0)

    def _made_ahead(self, epoch: int, start: int, topology: Topology) -> Iterator[Batch]:
        """Make batches on one thread, a few ahead of use."""
        waiting: deque[Future[tuple[Batch, Any]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-loader") as pool:
            try:
                for step in self._steps(epoch, start, topology):
                    waiting.append(pool.submit(self._make, step))
                    if len(waiting) > self._prefetch_batches:
                        yield self._transfer.received(*waiting.popleft().result())
                while waiting:
                    yield self._transfer.received(*waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def _steps(self, epoch: int, start: int, topology: Topology) -> Iterator[_Step]:
        """Give what each step needs, from a batch on: this rank's examples."""
        order = self._epochs.order(epoch)
        at_a_time = max(1, _ORDER_POSITIONS * topology.world_size // self.batch_size)
        for first in range(start, len(self), at_a_time):
            parts = [
                topology.part(*self._batches.positions(index))
                for index in range(first, min(first + at_a_time, len(self)))
            ]
            positions = np.concatenate([np.arange(*part) for part in parts])
            indices = np.split(self._epochs.indices_at(order, positions), np.cumsum([b - a for a, b in parts])[:-1])
            for number, examples in enumerate(indices, start=first):
                checked = examples if number == start else examples[[int(examples[0]) % len(examples)]]
                yield _Step(examples, checked)

    def _make(self, step: _Step) -> tuple[Batch, Any]:
        self._joined.check_digests(step.checked)
        inputs = self.inputs.read_inputs(step.indices, view_index=self._joined.view_index)
        labels = None if self._labels is None else self._labels[torch.from_numpy(step.indices)]
        rows, num_rows = self._joined.rows_of(step.indices)
        soft_targets = self.cache.read_rows(rows, teachers=self._teachers)
        if not self._joined.has_single_rows:
            soft_targets = replace(soft_targets, num_rows=torch.from_numpy(num_rows))
        return self._transfer.send((inputs, labels, soft_targets))


@dataclass(frozen=True, eq=False)
class _Step:
    """A step's examples, and those of them whose inputs are held against their digests: positions in the inputs."""

    indices: np.ndarray
    checked: np.ndarray


@dataclass(frozen=True, eq=False)
class _Epochs:
    """The order of every epoch, over the chosen examples."""

    joined: JoinedExamples
    seed: int
    is_shuffled: bool
    window_shards: int | None
    examples: np.ndarray
    first_examples: np.ndarray | None

    @classmethod
    def of(
        cls,
        joined: JoinedExamples,
        *,
        seed: int,
        shuffle: Shuffle | None,
        teachers: Sequence[str] | None,
        max_resident_bytes: int,
        window_shards: int | None,
    ) -> _Epochs:
        if not (shuffle is None or isinstance(shuffle, bool) or shuffle == "windowed"):
            raise OptionError(f"shuffle is {shuffle!r}; give True, False or 'windowed'")
        num_bytes = joined.cache.coded_bytes(teachers=teachers)
        is_windowed = shuffle == "windowed" or (shuffle is None and num_bytes > max_resident_bytes)
        if window_shards is not None and (window_shards < 1 or not is_windowed):
            raise OptionError(f"window_shards is {window_shards}; it is at least 1, and needs shuffle='windowed'")
        if not is_windowed:
            return cls(joined, seed, shuffle is not False, None, joined.indices, None)
        shard_bytes = max(1, num_bytes // joined.cache.document.num_shards)
        stored = joined.in_storage_order()
        shards = window_shards or max(1, max_resident_bytes // 4 // shard_bytes)
        return cls(joined, seed, True, shards, stored, joined.first_of_shards(stored))

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def digest(self) -> int:
        """48 bits that tell apart other examples, another order of them, other views and, of windows, other shards."""
        hasher = hashlib.blake2b(self.joined.first_rows_of(self.examples).tobytes(), digest_size=6)
        hasher.update(b"" if self.first_examples is None else self.first_examples.tobytes())
        return int.from_bytes(hasher.digest(), "little")

    def order(self, epoch: int) -> Order:
        if not self.is_shuffled:
            return SequentialOrder(self.num_examples)
        if self.window_shards is None or self.first_examples is None:
            return ShuffledOrder(self.num_examples, self.seed, epoch)
        return WindowedOrder(self.first_examples, self.window_shards, self.seed, epoch)

    def indices_at(self, order: Order, positions: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.examples[order.at(positions)]
        return found
