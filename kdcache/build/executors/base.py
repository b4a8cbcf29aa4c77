"""What an executor is."""

from __future__ import annotations

__all__ = ["Executor"]

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from kdcache.build.pilot import Pilot
from kdcache.build.work import Work
from kdcache.documents import Record


class Executor(Protocol):
    """Runs pilots and tasks somewhere. What is done is read from the store, never from an executor.

    A context manager: what it starts when it is entered, such as a cluster, it stops when it is left.
    """

    def __enter__(self) -> Self:
        """Start what is needed."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop what was started."""
        ...

    def pilot(self, work: Work, name: str, *, with_curve: bool = False) -> Pilot:
        """Run one stored teacher on the pilot and fit its codec; see `run_pilot`."""
        ...

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
