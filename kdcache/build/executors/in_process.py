"""Tasks in this process."""

from __future__ import annotations

__all__ = ["InProcessExecutor"]

from collections.abc import Callable, Mapping, Sequence

from kdcache.build.work import Work
from kdcache.documents import Record


class InProcessExecutor:
    """Runs one teacher after the other; loading, inference, encoding and writing overlap."""

    def run(self, work: Work, tasks: Mapping[str, Sequence[int]], on_record: Callable[[Record], None]) -> None:
        """Run all tasks; see `Executor.run`."""
        for name, shard_indices in tasks.items():
            if shard_indices:
                for record in work.run(name, shard_indices):
                    on_record(record)
