"""Work: everything a process needs to run tasks, small enough to be sent to it."""

from __future__ import annotations

__all__ = ["StoredTeacher", "Work"]

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kdcache.build.inference import BatchLogits, Inputs
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.task import Destination, run_tasks
from kdcache.build.teachers import Teacher
from kdcache.documents import Fingerprint, PlanDocument, Record
from kdcache.errors import KdcacheError
from kdcache.store import CacheStore
from kdcache.transfer_set import TransferSet


@dataclass(frozen=True, eq=False)
class StoredTeacher:
    """A teacher as it is stored: one network, or the merged mean of all."""

    name: str
    teacher: Teacher
    members: tuple[Fingerprint, ...]


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
    pilot: dict[str, Mapping[BatchKey, Tensor]] = field(default_factory=dict)
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

    def run(self, name: str, shard_indices: Sequence[int]) -> Iterator[Record]:
        """Run one teacher's tasks for several shards in this process, yielding each record."""
        store = CacheStore.at(self.address)
        document = store.teacher(name)
        if document is None:
            raise KdcacheError(f"cache {self.address}: the document of teacher {name!r} is gone; run the build again")
        destination = Destination.open(store, self.plan.cache, document)
        with self.stored_teacher(name).teacher.running() as run:
            batches = BatchLogits(
                name, run, self.inputs, num_classes=self.plan.cache.num_classes, kept=self.pilot.get(name)
            )
            yield from run_tasks(destination, batches, self.row_map, shard_indices)

    def __getstate__(self) -> dict[str, object]:
        return {**{key: value for key, value in self.__dict__.items() if key != "row_map"}, "pilot": {}}
