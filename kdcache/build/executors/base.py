"""What an executor is."""

from __future__ import annotations

__all__ = ["Executor"]

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kdcache.build.work import Work
from kdcache.documents import Record


class Executor(Protocol):
    """Runs tasks somewhere. What is done is read from the store, never from an executor."""

    def run(self, work: Work, tasks: Mapping[str, Sequence[int]], on_record: Callable[[Record], None]) -> None:
        """Run the tasks of each stored teacher, calling `on_record` for each that ends, in any order.

        Parameters
        ----------
        work : Work
        tasks : mapping of teacher name to shard indices
        on_record : callable (Record) -> None
            Called in the calling thread.

        Raises
        ------
        KdcacheError
            What stopped a task. Shards that are published are kept.
        """
        ...
