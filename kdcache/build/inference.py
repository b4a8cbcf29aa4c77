"""Inference: a teacher's logits, batch by batch of the grid, checked, and cut into shards."""

from __future__ import annotations

__all__ = ["BatchLogits", "Inputs", "shard_logits"]

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from kdcache.build.rows import BatchKey, RowMap
from kdcache.codecs.head_logits import Head, HeadLogits, Logits, concatenated, rows_of
from kdcache.errors import (
    ExecutorError,
    InputMismatchError,
    KdcacheError,
    NonFiniteLogitsError,
    TeacherError,
    WrongClassCountError,
)
from kdcache.store.locks import OwnLock
from kdcache.threads import LoopThreads
from kdcache.transfer_set import TransferSet

LOOK_AHEAD = 2
"""Batches loaded ahead of the teacher."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Batches of inputs, loaded ahead of use.

    Parameters
    ----------
    transfer_set : TransferSet
    row_map : RowMap
    num_workers : int
        Processes that load examples; 0 loads on one thread.
    """

    transfer_set: TransferSet
    row_map: RowMap
    num_workers: int = 0
    _turn: OwnLock = field(default_factory=OwnLock, init=False, repr=False, compare=False)
    """Of who loads: a stream that was left may be at its last batch when another begins, and a dataset is for one."""

    @property
    def held_batches(self) -> int:
        """Batches that are held at most: those loaded ahead, one as single inputs and as a whole, and the teacher's."""
        return LOOK_AHEAD * max(1, self.num_workers) + 3

    def batches(self, keys: Sequence[BatchKey]) -> Generator[Any]:
        """Yield the inputs of batches, in the order of `keys`."""
        if self.num_workers:
            yield from _load_with_processes(self, keys)
        else:
            yield from _load_with_thread(self, keys)

    def load(self, key: BatchKey) -> Any:
        """Load one batch, and check one of its inputs against the digest taken when the cache was planned.

        Raises
        ------
        InputMismatchError
            The dataset now gives another input for an example.
        """
        indices = self.row_map.examples_of_batch(key)
        with self._turn:
            self._check_input(int(indices[key.batch_index % len(indices)]))
            return self.transfer_set.read_inputs(indices, view_index=key.view_index)

    def name_row(self, view_index: int, row: int) -> str:
        """Say which example a row of a view's block is of."""
        index = self.row_map.example_at(row)
        return f"example {self.transfer_set.example_id(index)!r} (position {index}, view {view_index})"

    def _check_input(self, index: int) -> None:
        digests = self.transfer_set.input_digests
        if digests is None or self.transfer_set.digest_of(index) == digests[index].tobytes():
            return
        raise InputMismatchError(
            f"example {self.transfer_set.example_id(index)!r} (position {index}) gives another input than when the "
            "transfer set was read first. A transfer set must give the same input each time it is asked; put random "
            "augmentation into Views(transform=..., num_views=..., name=...). Shards that are published are kept"
        )


class BatchLogits:
    """A teacher's checked logits for batches of the grid.

    Parameters
    ----------
    name : str
        The teacher's name, for messages.
    run : callable (inputs) -> Tensor
        The running teacher: gives logits, or hidden states where `head` is given.
    inputs : Inputs
    num_classes : int, optional
        Classes expected; whatever the teacher gives where absent.
    kept : mapping of BatchKey to Tensor [row, class] or HeadLogits, optional
        Logits that are known already (the pilot's).
    head : Head, optional
        Makes logits of what `run` gives; they are streamed as hidden states and this head.

    Attributes
    ----------
    largest_input_bytes : int
        Of the batches that were loaded, what the tensors and arrays of the largest take.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Any], Tensor],
        inputs: Inputs,
        *,
        num_classes: int | None,
        kept: Mapping[BatchKey, Logits] | None = None,
        head: Head | None = None,
    ) -> None:
        self._name = name
        self._run = run
        self._inputs = inputs
        self._num_classes = num_classes
        self._kept = kept or {}
        self._head = head
        self.largest_input_bytes = 0

    def stream(self, keys: Sequence[BatchKey]) -> Iterator[Logits]:
        """Yield the logits [row, class] of batches, in order, loading inputs ahead.

        Raises
        ------
        TeacherError, NonFiniteLogitsError, WrongClassCountError, InputMismatchError
        """
        with contextlib.closing(self._inputs.batches([key for key in keys if key not in self._kept])) as loaded:
            for key in keys:
                if key in self._kept:
                    yield self._kept[key]
                    continue
                inputs = next(loaded)
                self.largest_input_bytes = max(self.largest_input_bytes, _nested_bytes(inputs))
                yield self._checked(key, self._logits(key, inputs))

    def name_row(self, shard_index: int, row: int) -> str:
        """Say which example a row of a shard is of."""
        view_index, first, _ = self._inputs.row_map.shard_rows(shard_index)
        return self._inputs.name_row(view_index, first + row)

    def _logits(self, key: BatchKey, inputs: Any) -> Tensor:
        try:
            return self._run(inputs)
        except KdcacheError:
            raise
        except Exception as error:
            examples = self._inputs.row_map.examples_of_batch(key).tolist()
            first, last = (self._inputs.transfer_set.example_id(examples[end]) for end in (0, -1))
            raise TeacherError(
                f"teacher {self._name!r} failed on the batch of {len(examples)} examples from {first!r} to {last!r}: "
                f"{type(error).__name__}: {error}. Shards that are published are kept; mend the teacher or its inputs "
                "and run the same command again"
            ) from error

    def _checked(self, key: BatchKey, logits: Tensor) -> Logits:
        row_map = self._inputs.row_map
        examples = row_map.examples_of_batch(key)
        if logits.ndim not in {2, 3} or len(logits) != len(examples) or not logits.dtype.is_floating_point:
            raise WrongClassCountError(
                f"teacher {self._name!r} gave logits of shape {tuple(logits.shape)} and dtype {logits.dtype} for "
                f"{len(examples)} examples; expected floating-point [example, class] or [example, position, class]. "
                "Shards that are published are kept"
            )
        num_classes = logits.shape[-1] if self._head is None else self._classes_of(self._head, logits)
        if self._num_classes is not None and num_classes != self._num_classes:
            raise WrongClassCountError(self._other_classes(num_classes))
        rows = self._as_rows(logits, row_map.num_rows[examples])
        # of logits, -inf beside a finite one is a masked class
        extreme = rows.amax(dim=1) if self._head is None else rows.abs().amax(dim=1)
        if rows.numel() and not bool(extreme.isfinite().all()):
            self._report_non_finite(key, rows, extreme)
        return rows if self._head is None else HeadLogits(rows, self._head)

    def _other_classes(self, found: int) -> str:
        plan = self._inputs.row_map.plan
        if self._name == plan.stored_names[0]:  # nothing but the option can have said otherwise
            return (
                f"teacher {self._name!r} gives {found} classes, and num_classes={self._num_classes} was asked for. "
                f"Leave num_classes out, or give num_classes={found}, or a teacher with the right head. Nothing of "
                "this teacher was written"
            )
        return (
            f"teacher {self._name!r} gives {found} classes, the cache has {self._num_classes}. Every teacher of an "
            "ensemble covers the same classes in the same order. Nothing of this teacher was written; give a teacher "
            "with the right head, or build it into a cache of its own"
        )

    def _classes_of(self, head: Head, hidden: Tensor) -> int:
        num_classes, num_components = head.weight.shape
        if hidden.shape[-1] != num_components:
            raise WrongClassCountError(
                f"the body of teacher {self._name!r} gives hidden states of {hidden.shape[-1]} components, its head "
                f"takes {num_components}. Shards that are published are kept; mend the teacher and run the same "
                "command again"
            )
        return num_classes

    def _as_rows(self, logits: Tensor, counts: Any) -> Tensor:
        if logits.ndim == 2:
            if counts.max() > 1:
                raise WrongClassCountError(
                    f"teacher {self._name!r} gives one row an example, but the transfer set says num_rows up to "
                    f"{counts.max()}; a sequence teacher gives [example, position, class]"
                )
            return logits
        most = int(self._inputs.row_map.num_rows.max())
        if counts.max() > logits.shape[1] or (most == 1 and logits.shape[1] > 1):
            raise WrongClassCountError(
                f"teacher {self._name!r} gives {logits.shape[1]} positions an example, but the transfer set says "
                f"num_rows up to {most}. Give the positions of each example: TransferSet(num_rows=...)"
            )
        return torch.cat([logits[index, :count] for index, count in enumerate(counts.tolist())])

    def _report_non_finite(self, key: BatchKey, rows: Tensor, extreme: Tensor) -> None:
        row_map = self._inputs.row_map
        bad = int((~torch.isfinite(extreme)).nonzero()[0, 0])
        index = row_map.example_at(row_map.rows_of_batch(key)[0] + bad)
        if self._head is None:
            values = rows[bad][rows[bad].isnan() | rows[bad].isposinf()].tolist()
            given = f"{values[0]} among the logits" if values else "nothing but -inf as the logits"
        else:
            given = f"{rows[bad][~rows[bad].isfinite()][0].item()} among the hidden states"
        raise NonFiniteLogitsError(
            f"teacher {self._name!r} gave {given} of example "
            f"{self._inputs.transfer_set.example_id(index)!r} (position {index}, view {key.view_index}). Such a "
            "row has no soft targets, so the shard was not written; shards that are published are kept. Mend the "
            "input, or run the teacher in higher precision (autocast off), and run the same command again. Classes "
            "may be masked with -inf where a row keeps a finite logit"
        )


def shard_logits(batches: BatchLogits, row_map: RowMap, shard_indices: Iterable[int]) -> Iterator[tuple[int, Logits]]:
    """Yield (shard index, logits [row, class]) for shards in order, running each batch of the grid at most once."""
    shards = sorted(shard_indices)
    keys = list(dict.fromkeys(key for shard in shards for key in row_map.batches_of_shard(shard)))
    stream = zip(keys, batches.stream(keys), strict=True)
    held: dict[BatchKey, Logits] = {}
    for shard in shards:
        needed = row_map.batches_of_shard(shard)
        held = {key: logits for key, logits in held.items() if key in needed}
        while needed[-1] not in held:
            key, logits = next(stream)
            held[key] = logits
        _, start, end = row_map.shard_rows(shard)
        yield shard, concatenated([_cut(row_map, key, held[key], start, end) for key in needed])


def _cut(row_map: RowMap, key: BatchKey, logits: Logits, start: int, end: int) -> Logits:
    first, last = row_map.rows_of_batch(key)
    return rows_of(logits, slice(max(start - first, 0), min(end, last) - first))


def _nested_bytes(inputs: Any) -> int:
    return sum(_bytes_of(leaf) for leaf in tree_leaves(inputs))


def _bytes_of(leaf: Any) -> int:
    is_counted = isinstance(leaf, np.ndarray) or (isinstance(leaf, Tensor) and leaf.layout == torch.strided)
    return int(leaf.nbytes) if is_counted else 0


def _load_with_thread(inputs: Inputs, keys: Sequence[BatchKey]) -> Iterator[Any]:
    threads = LoopThreads(1, "kdcache-inputs")
    waiting: deque[Future[Any]] = deque()
    try:
        for key in keys:
            waiting.append(threads.submit(inputs.load, key))
            if len(waiting) > LOOK_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.leave()


class _BatchDataset(Dataset[Any]):
    def __init__(self, inputs: Inputs, keys: Sequence[BatchKey]) -> None:
        self._inputs = inputs
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Any:
        return self._inputs.load(self._keys[index])


def _load_with_processes(inputs: Inputs, keys: Sequence[BatchKey]) -> Iterator[Any]:
    if multiprocessing.current_process().daemon:
        raise ExecutorError(
            f"num_workers={inputs.num_workers} asks for processes that load examples, and this worker is daemonic: it "
            "may not start any. Start Dask workers with the setting distributed.worker.daemon=false (DASK_DISTRIBUTED__"
            "WORKER__DAEMON=False), or use num_workers=0. Shards that are published are kept"
        )
    yield from DataLoader(
        _BatchDataset(inputs, keys),
        batch_size=None,
        num_workers=inputs.num_workers,
        prefetch_factor=LOOK_AHEAD,
        multiprocessing_context="forkserver",
    )
