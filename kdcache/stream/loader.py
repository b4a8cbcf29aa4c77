"""SoftTargetLoader: batches of (inputs, labels, soft targets), joined by example_id."""

from __future__ import annotations

__all__ = ["SoftTargetLoader"]

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import RESIDENT_BYTES, SoftTargetCache
from kdcache.errors import OptionError, TransferSetError
from kdcache.soft_targets import SoftTargets
from kdcache.stream.ahead import made_ahead
from kdcache.stream.batches import GlobalBatches, Topology, Wanted
from kdcache.stream.epochs import Epochs, Shuffle, Windows
from kdcache.stream.inputs import InputBatch, InputReader
from kdcache.stream.joined import JoinedExamples, ids_as_inputs
from kdcache.stream.order import Order
from kdcache.stream.tiers import TIERS, RowReading, Tier, choose_tier, open_tier
from kdcache.stream.transfer import DeviceTransfer
from kdcache.transfer_set import TransferSet

Batch = tuple[Any, Tensor | None, SoftTargets]

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
    inputs : TransferSet or map-style dataset, optional
        The students' inputs. A plain dataset's ids are its positions; wrap it in a TransferSet to name them. Where
        absent, batches have the cache's example_ids in their place, an int64 tensor or a list of str, for inputs that
        come from elsewhere.
    batch_size : int
        Examples of a step, of all ranks together.
    seed : int
        Of the shuffle.
    shuffle : bool or "windowed"
        True draws a permutation of all examples; "windowed" one of blocks of storage and, within windows of some
        blocks, of their examples, so that each block is read once an epoch. False keeps the transfer set's order. By
        default a cache is shuffled whole where its coded rows take no more than `max_resident_bytes` or lie in a local
        copy, else windowed.
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
    num_workers : int
        Processes that read inputs and make views of them, kept from epoch to epoch; 0 reads on a thread. They never
        touch the cache. What a dataset draws at random is seeded in them for each batch of a rank: the same for any
        number of workers from 1 on, and after a restore. On the thread it is drawn from this process's own generators.
    start_method : {"fork", "spawn", "forkserver"}, optional
        How workers are started; Python's default where absent.
    worker_init : callable () -> None, optional
        Run once in every worker.
    prefetch_batches : int
        Batches made ahead of use; with workers, as many for each of them.
    device : str, optional
        Where batches are copied, ahead of use: inputs, labels and soft targets, which stay coded.
    tier : {"device", "memory", "mapped", "windows", "scattered"}, optional
        Where coded rows are taken from; see `kdcache.stream.tiers`. Chosen by what fits where absent.
    max_resident_bytes : int
        A cache whose coded rows take no more is held in memory, or on the device where that has room.
    window_bytes : int, optional
        Coded rows of a window of a windowed shuffle; the tier "windows" holds three. By default a 24th of
        the cache, at least 8 MiB and at most 256 MiB.
    local_copy : path, optional
        Local folder for an uncompressed copy of the rows, made where it does not stand: the tier "mapped".

    Raises
    ------
    UnknownExampleError
        An example of `inputs` is not in the cache.
    ShapeError
        An example has another number of rows than in the cache; a batch has fewer examples than there are ranks, or
        with `drop_last` more than there are at all.
    InputMismatchError
        The inputs have other views or labels than the cache; while iterating: an input is not the one that the teachers
        saw.
    CorruptCacheError
        While iterating: a shard is missing, torn or altered.
    OptionError
        An option has a value out of its range, or needs another.
    StoreError
        The local copy cannot be made.
    WorkerError
        While iterating: a worker died.

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
        inputs: TransferSet | Any | None = None,
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
        num_workers: int = 0,
        start_method: str | None = None,
        worker_init: Callable[[], None] | None = None,
        prefetch_batches: int = 2,
        device: str | None = None,
        tier: Tier | None = None,
        max_resident_bytes: int = RESIDENT_BYTES,
        window_bytes: int | None = None,
        local_copy: str | Path | None = None,
    ) -> None:
        _check_options(cache, batch_size, shuffle, prefetch_batches, tier, local_copy)
        self._teachers = teachers
        self.cache = cache
        self.inputs = _as_transfer_set(cache, inputs)
        self._joined = JoinedExamples(
            cache, self.inputs, example_ids=example_ids, view_index=view_index, checks_inputs=inputs is not None
        )
        self._transfer = DeviceTransfer(device)
        chosen, is_windowed = _resolved(
            tier, shuffle, cache, teachers=teachers, device=self._transfer.device,
            max_resident_bytes=max_resident_bytes, local_copy=local_copy,
        )  # fmt: skip
        windows = _windows(cache, self._joined, is_windowed, teachers=teachers, window_bytes=window_bytes)
        self._epochs = Epochs.of(self._joined, seed=seed, shuffle=shuffle is not False, windows=windows)
        self._batches = GlobalBatches(self._epochs.num_examples, batch_size, drop_last)
        self._topology = (rank, world_size)
        self._batches.check_parts(Topology.current(rank, world_size))
        self._prefetch_batches = prefetch_batches * max(1, num_workers)
        self._labels = None if self.inputs.labels is None else torch.from_numpy(self.inputs.labels)
        self._source = open_tier(
            chosen, cache, self._epochs, teachers=teachers, device=self._transfer.device, local_copy=local_copy
        )
        self._reader = InputReader(
            self.inputs, view_index=view_index, num_workers=num_workers, start_method=start_method,
            worker_init=worker_init,
        )  # fmt: skip
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
    def epoch(self) -> int:
        """The epoch that the next iteration gives, or goes on with after `load_state_dict`."""
        return self._epoch

    @property
    def seed(self) -> int:
        """Seed of the shuffle."""
        return self._epochs.seed

    @property
    def tier(self) -> str:
        """Where coded rows are taken from; see `kdcache.stream.tiers`."""
        return self._source.tier

    @property
    def held_bytes(self) -> int:
        """Bytes of coded rows that are held at most, in this process's memory or on the device, besides batches."""
        return min(self._source.held_bytes, self.cache.coded_bytes(teachers=self._teachers))

    def close(self) -> None:
        """End the workers. The next iteration starts others; a loader that is no longer needed ends its own."""
        self._reader.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its first batch.

        The epoch in which `load_state_dict` left off keeps its place: a loop that names its epochs goes on within it.
        """
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0
        self._position = (self._epoch, self._start)

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
        if not isinstance(state, Mapping) or not {"epoch", "next_batch"} <= state.keys():
            found = sorted(state) if isinstance(state, Mapping) else state
            raise TransferSetError(f"this is no state of a loader: it has no epoch and next_batch, only {found!r}")
        ours = self._order_state()
        other = {key: state.get(key) for key, value in ours.items() if state.get(key) != value}
        if other:
            raise TransferSetError(
                f"the state is of a loader with {other}, this one has { {key: ours[key] for key in other} }: examples "
                "would be lost or repeated. Make the loader with the same arguments; block_rows and window_blocks "
                "follow from shuffle, window_bytes, max_resident_bytes and tier, and are 0 unless a shuffle is windowed"
            )
        self._epoch, self._start = state["epoch"], state["next_batch"]
        if self._start >= len(self):  # of a loader that had more batches: with drop_last the last one is left out
            self._epoch, self._start = self._epoch + 1, 0
        self._position = (self._epoch, self._start)

    def _order_state(self) -> dict[str, int]:
        windows = self._epochs.windows
        return {
            "seed": self.seed,
            "shuffle": int(self._epochs.is_shuffled),
            "block_rows": 0 if windows is None else windows.block_rows,
            "window_blocks": 0 if windows is None else windows.window_blocks,
            "batch_size": self.batch_size,
            "num_examples": self._batches.num_examples,
            "examples": self._epochs.digest,
        }

    def __iter__(self) -> Iterator[Batch]:
        """Give a whole epoch, or after `load_state_dict` the rest of one; the next iteration gives the next epoch.

        An iteration that is left before its last batch does not count: the next one gives that epoch from its start.
        """
        epoch, start, self._start = self._epoch, self._start, 0
        topology = Topology.current(*self._topology)
        self._batches.check_parts(topology)
        self._reader.start()
        self._transfer.begin()
        for number, batch in enumerate(self._made_ahead(epoch, start, topology), start=start + 1):
            # With its last batch an epoch is over: who counts batches does not ask for what would come behind it.
            if number < len(self):
                self._position = (epoch, number)
            else:
                self._end(epoch)
            yield batch

    def _end(self, epoch: int) -> None:
        self._epoch = epoch + 1
        self._position = (epoch + 1, 0)

    def _made_ahead(self, epoch: int, start: int, topology: Topology) -> Iterator[Batch]:
        """Make batches on a thread, a few ahead of use."""
        order = self._epochs.order(epoch)
        asked: deque[_Step] = deque(maxlen=2 * self._prefetch_batches + 2)
        wanted = Wanted(self._batches, topology, start)
        reading = self._source.reading(order, wanted)
        ahead = made_ahead(
            lambda step: self._make(step, reading),
            _noted(self._steps(order, epoch, start, topology), asked),
            depth=self._prefetch_batches,
            one_by_one=self._reader.num_workers > 0,
            release=reading.close,
        )
        try:
            for batch, copied in ahead:
                yield self._transfer.received(batch, copied)
        finally:
            self._reader.forget(step.inputs for step in asked)
            ahead.close()

    def _steps(self, order: Order, epoch: int, start: int, topology: Topology) -> Iterator[_Step]:
        """Give what each step needs, from a batch on: this rank's examples, whose inputs are asked for."""
        at_a_time = max(1, _ORDER_POSITIONS * topology.world_size // self.batch_size)
        for first in range(start, len(self), at_a_time):
            numbers = range(first, min(first + at_a_time, len(self)))
            parts = [topology.part(*self._batches.positions(number)) for number in numbers]
            positions = np.concatenate([np.arange(*part) for part in parts])
            indices = self._epochs.indices_at(order, positions)
            edges = list(itertools.accumulate(stop - begin for begin, stop in parts))[:-1]
            for number, begin, end in zip(numbers, [0, *edges], [*edges, len(positions)], strict=True):
                yield self._step(epoch, number, indices[begin:end], positions[begin:end], is_first=number == start)

    def _step(self, epoch: int, number: int, indices: np.ndarray, positions: np.ndarray, *, is_first: bool) -> _Step:
        if not self._joined.has_digests:
            checked = indices[:0]
        elif is_first:
            checked = indices
        else:
            place = int(indices[0]) % len(indices)
            checked = indices[place : place + 1]
        request = self._reader.request(indices, checked, seed=(self.seed, epoch, number, int(positions[0])))
        return _Step(indices, positions, checked, request)

    def _make(self, step: _Step, reading: RowReading) -> tuple[Batch, Any]:
        with self._transfer.beside():
            return self._made(step, reading)

    def _made(self, step: _Step, reading: RowReading) -> tuple[Batch, Any]:
        rows, num_rows = self._joined.rows_of(step.indices)
        soft_targets = reading.read(rows, step.positions)
        # Inputs come behind: where they are read and digested here, threads that decode would keep them waiting.
        inputs, digests = step.inputs()
        if len(step.checked):
            self._joined.check_digests(step.checked, digests)
        labels = None if self._labels is None else self._labels.index_select(0, torch.from_numpy(step.indices))
        if not self._joined.has_single_rows:
            soft_targets = replace(soft_targets, num_rows=torch.from_numpy(num_rows))
        return self._transfer.send((inputs, labels, soft_targets))


@dataclass(frozen=True, eq=False)
class _Step:
    """A step's examples, int64 [example]: positions in the inputs, and of the epoch; and those that are checked."""

    indices: np.ndarray
    positions: np.ndarray
    checked: np.ndarray
    inputs: Callable[[], InputBatch]


def _noted(steps: Iterator[_Step], asked: deque[_Step]) -> Iterator[_Step]:
    for step in steps:
        asked.append(step)
        yield step


def _as_transfer_set(cache: SoftTargetCache, inputs: TransferSet | Any | None) -> TransferSet:
    if inputs is None:
        return ids_as_inputs(cache)
    return inputs if isinstance(inputs, TransferSet) else TransferSet(inputs)


def _check_options(
    cache: Any,
    batch_size: Any,
    shuffle: Shuffle | None,
    prefetch_batches: int,
    tier: str | None,
    local_copy: str | Path | None,
) -> None:
    if not isinstance(cache, SoftTargetCache):
        raise OptionError(f"cache is {cache!r}, a {type(cache).__name__}; give what kdcache.open_cache returns")
    if not isinstance(batch_size, int):
        raise OptionError(f"batch_size is {batch_size!r}; give a number of examples")
    if prefetch_batches < 1:
        raise OptionError(f"prefetch_batches is {prefetch_batches}; at least 1 is needed")
    if not (shuffle is None or isinstance(shuffle, bool) or shuffle == "windowed"):
        raise OptionError(f"shuffle is {shuffle!r}; give True, False or 'windowed'")
    if tier is not None and tier not in TIERS:
        raise OptionError(f"tier is {tier!r}; give one of {', '.join(TIERS)}, or none to have one chosen")
    if local_copy is not None and tier not in {None, "mapped"}:
        raise OptionError(f"local_copy is for tier='mapped', and tier is {tier!r}; leave one of them out")


def _resolved(tier: Tier | None, shuffle: Shuffle | None, cache: SoftTargetCache, **options: Any) -> tuple[Tier, bool]:
    """Bring tier and shuffle together; gives the tier and whether the shuffle is windowed."""
    chosen = tier or choose_tier(cache, **options)
    if tier is None and chosen == "windows" and isinstance(shuffle, bool):
        return "scattered", False
    return chosen, shuffle == "windowed" or (shuffle is None and chosen == "windows")


def _windows(
    cache: SoftTargetCache,
    joined: JoinedExamples,
    is_windowed: bool,  # noqa: FBT001 - what it is about
    *,
    teachers: Sequence[str] | None,
    window_bytes: int | None,
) -> Windows | None:
    if is_windowed:
        return Windows.of(
            cache, teachers=teachers, window_bytes=window_bytes, most_rows_an_example=joined.most_rows_an_example
        )
    if window_bytes is not None:
        raise OptionError(f"window_bytes is {window_bytes}; it needs shuffle='windowed'")
    return None
