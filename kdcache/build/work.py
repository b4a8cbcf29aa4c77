"""Work: everything a process needs to run tasks, small enough to be sent to it."""

from __future__ import annotations

__all__ = ["StoredTeacher", "Work"]

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kdcache.build.failures import FailedShard
from kdcache.build.inference import BatchLogits, Inputs
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.task import Destination, run_tasks
from kdcache.build.teachers import HeadedTeacher, Teacher
from kdcache.codecs.head_logits import Head, HeadLogits, Logits
from kdcache.documents import Fingerprint, PlanDocument, PlannedCodec, RateTarget, Record, Spectral
from kdcache.errors import KdcacheError
from kdcache.store import CacheStore
from kdcache.transfer_set import TransferSet


@dataclass(frozen=True, eq=False)
class StoredTeacher:
    """A teacher as it is stored: one network, or the merged mean of all."""

    name: str
    teacher: Teacher
    members: tuple[Fingerprint, ...]

    @contextlib.contextmanager
    def running(self, codec: PlannedCodec) -> Iterator[tuple[Callable[[Any], Tensor], Head | None]]:
        """Make the teacher ready for a codec: its body and head where it hands them out and the codec can use them.

        Yields a function from a batch of inputs to logits, and None; or to hidden states, and the head.
        """
        teacher = self.teacher
        if (
            isinstance(codec, Spectral | RateTarget)
            and isinstance(teacher, HeadedTeacher)
            and teacher.has_linear_head()
        ):
            with teacher.running_body() as body_and_head:
                yield body_and_head
            return
        with teacher.running() as run:
            yield run, None


@dataclass(frozen=True, eq=False)
class Work:
    """A plan, its transfer set and its teachers.

    Parameters
    ----------
    address : str
        The cache's address.
    plan : PlanDocument
    transfer_set : TransferSet
    teachers : tuple of StoredTeacher
    num_workers : int
        Processes that load examples.
    """

    address: str
    plan: PlanDocument
    transfer_set: TransferSet
    teachers: tuple[StoredTeacher, ...]
    num_workers: int = 0
    import_folders: tuple[str, ...] = ()
    """Where the modules of a job file are found, for processes that have another path."""
    pilot: dict[str, Mapping[BatchKey, Logits]] = field(default_factory=dict)
    """Logits the pilot computed, by stored teacher: used again by this process, not sent to others."""

    @functools.cached_property
    def row_map(self) -> RowMap:
        """The plan's rows, laid over examples and batches."""
        return RowMap(self.plan, self.transfer_set.num_rows)

    @property
    def inputs(self) -> Inputs:
        """Batches of inputs."""
        return Inputs(self.transfer_set, self.row_map, self.num_workers)

    def stored_teacher(self, name: str) -> StoredTeacher:
        """Find a stored teacher by its name."""
        return next(teacher for teacher in self.teachers if teacher.name == name)

    def run(self, name: str, shard_indices: Sequence[int]) -> Iterator[Record | FailedShard]:
        """Run one teacher's tasks for several shards in this process, yielding each record, or what stopped it."""
        store = CacheStore.at(self.address)
        document = store.teacher(name)
        if document is None:
            raise KdcacheError(
                f"cache {self.address}: the document of teacher {name!r} is gone; run `kdcache repair {self.address}`"
            )
        destination = Destination.open(store, self.plan.cache, document)
        kept = self.pilot.get(name)
        with self.stored_teacher(name).running(document.codec) as (run, head):
            batches = BatchLogits(
                name,
                run,
                self.inputs,
                num_classes=self.plan.cache.num_classes,
                kept=_of_one_kind(kept, head),
                head=head,
            )
            yield from run_tasks(destination, batches, self.row_map, shard_indices)

    def __getstate__(self) -> dict[str, object]:
        return {**{key: value for key, value in self.__dict__.items() if key != "row_map"}, "pilot": {}}


def _of_one_kind(kept: Mapping[BatchKey, Logits] | None, head: Head | None) -> Mapping[BatchKey, Logits] | None:
    """Leave out pilot logits that were made otherwise than the tasks make theirs."""
    if kept is None:
        return None
    same = {key: logits for key, logits in kept.items() if isinstance(logits, HeadLogits) == (head is not None)}
    if head is None:
        return same
    return {key: HeadLogits(logits.hidden, head) for key, logits in same.items() if isinstance(logits, HeadLogits)}
