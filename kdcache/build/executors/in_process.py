"""Tasks in this process."""

from __future__ import annotations

__all__ = ["InProcessExecutor"]

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from kdcache.build.failures import FailedShard, Failures
from kdcache.build.pilot import Pilot, run_pilot
from kdcache.build.work import Work
from kdcache.documents import Record


class InProcessExecutor:
    """Runs one teacher after the other; loading, inference, encoding and writing overlap."""

    def __enter__(self) -> Self:
        """Start nothing: this process is there."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop nothing."""

    def pilot(self, work: Work, name: str, *, with_curve: bool = False) -> Pilot:
        """Run the pilot, and keep its logits for the tasks that need them again."""
        pilot = run_pilot(work.stored_teacher(name), work.inputs, with_curve=with_curve)
        work.pilot[name] = pilot.kept
        return pilot

    def run(self, work: Work, tasks: Mapping[str, Sequence[int]], on_record: Callable[[Record], None]) -> None:
        """Run all tasks; see `Executor.run`."""
        failures = Failures(sum(len(shards) for shards in tasks.values()))
        for name, shard_indices in tasks.items():
            for outcome in work.run(name, shard_indices) if shard_indices else ():
                if isinstance(outcome, FailedShard):
                    failures.add(outcome)
                else:
                    failures.note_success()
                    on_record(outcome)
        failures.raise_first()
