"""Rounds: all tasks together first, then those that Dask blames for dead workers apart, until each is built or guilty.

A task that kills its worker takes the blameless ones beside it along. What Dask gives up is therefore suspect only, and
is sent again in smaller company, at last alone: workers that die then die of it, and it is put into quarantine.
"""

from __future__ import annotations

__all__ = ["Rounds", "from_all_over", "spans_of"]

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from distributed import Future

from kdcache.build.executors.flight import Flight, Loss
from kdcache.build.failures import FailedShard, Failures, shard_names
from kdcache.build.work import Work
from kdcache.documents import Record
from kdcache.errors import ExecutorError
from kdcache.store import CacheStore

DEATHS_ALONE = 2
"""Workers that a task must kill while it runs alone before it is put into quarantine, at least."""

QUARANTINED_AT_ONCE = 3
"""Shards put into quarantine with none built between them after which shards from all over are tried."""

MAX_QUARANTINED_IN_A_ROW = 8
"""Shards put into quarantine with none built between them after which a build stops, where more are left."""

MAX_BLAMED_IN_A_ROW = 4
"""Losses that are blamed on tasks, with nothing built between them, after which the suspects are tried first."""

MAX_FRUITLESS_ROUNDS = 3
"""Rounds that lose everything and blame nobody after which everything is suspect."""

FEW_SUSPECTS = 8
"""Up to so many suspects are tried one by one at once; more of them first together, one a slot."""

_GOLDEN_RATIO = 0.618034
"""Steps of this length, modulo one, fall everywhere: however early one stops, there are no large gaps."""

Task = tuple[str, int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Span:
    teacher: str
    shards: tuple[int, ...]

    @property
    def tasks(self) -> set[Task]:
        return {(self.teacher, shard) for shard in self.shards}


@dataclass(frozen=True)
class _Trial:
    """What a task did while it ran alone: workers that died of it, times it was lost, and what was said of the last."""

    task: Task
    num_deaths: int = 0
    num_lost: int = 0
    said: str = ""

    def with_loss(self, loss: Loss) -> _Trial:
        return _Trial(self.task, self.num_deaths + loss.num_deaths, self.num_lost + 1, loss.said)


class Rounds:
    """One run of an executor's tasks.

    Parameters
    ----------
    work : Work
    tasks : iterable of (teacher, shard)
    flight : Flight
    send : callable (teacher, shards) -> Future
        Submits some shards of one teacher.
    on_record : callable (Record) -> None
    """

    def __init__(
        self,
        work: Work,
        tasks: Iterable[Task],
        flight: Flight,
        send: Callable[[str, tuple[int, ...]], Future[Any]],
        on_record: Callable[[Record], None],
    ) -> None:
        self._work = work
        self._remaining = set(tasks)
        self._num_tasks = len(self._remaining)
        self._suspects: set[Task] = set()
        self._quarantined: list[_Trial] = []
        self._trial: _Trial | None = None
        self._verdict: ExecutorError | None = None
        self._has_built = False
        self._in_a_row = 0
        self._failures = Failures(self._num_tasks)
        self._flight = flight
        self._send = send
        self._on_record = on_record

    def run(self) -> None:
        """Build all shards that can be built.

        Raises
        ------
        ExecutorError
            Shards are in quarantine, or the cluster was lost.
        Exception
            The first error of a task, once all others are built. What is known of shards that kill their workers stands
            in its notes.
        """
        try:
            self._run()
        except BaseException as error:
            if error is not self._verdict and (found := self._found()):
                error.add_note(found)
            raise
        if self._quarantined:
            raise self._in_quarantine("Every other shard is published") from self._failures.first
        self._failures.raise_first()

    def _run(self) -> None:
        num_fruitless = 0
        while self._remaining:
            free = self._remaining - self._suspects
            self._fly(self._spans(free), lambda slots: 2 * slots)
            num_fruitless = num_fruitless + 1 if self._remaining - self._suspects == free else 0
            if num_fruitless == MAX_FRUITLESS_ROUNDS:
                self._suspects |= self._remaining
            if len(self._suspects) > FEW_SUSPECTS:
                self._fly([_Span(name, (shard,)) for name, shard in sorted(self._suspects)], lambda slots: slots)
            self._try_suspects()

    def _spans(self, tasks: set[Task]) -> list[_Span]:
        """Group tasks, from all over once some are in quarantine: the shards beside those may be as bad."""
        spans = [_Span(name, tuple(shards)) for name, shards in spans_of(self._work, tasks)]
        return from_all_over(spans) if self._quarantined else spans

    def _try_suspects(self) -> None:
        """Try suspects alone, from all over, until a few in a row are guilty: then what else is left comes first."""
        for task in from_all_over(sorted(self._suspects)):
            self._try_alone(task)
            is_few = self._in_a_row and self._in_a_row % QUARANTINED_AT_ONCE == 0
            if is_few and self._remaining - self._suspects:
                return

    def _fly(self, spans: Iterable[_Span], width: Callable[[int], int]) -> None:
        """Run spans together; whoever is blamed for a death becomes suspect. End early where nothing else happens."""
        num_blamed, is_ending = 0, False
        with contextlib.closing(self._outcomes(spans, lambda slots: 0 if is_ending else width(slots))) as outcomes:
            for span, outcome in outcomes:
                if not isinstance(outcome, Loss):
                    num_blamed = 0
                    self._take(outcome)
                    continue
                self._take_published(span)
                if outcome.num_deaths:
                    self._suspects |= span.tasks & self._remaining
                    num_blamed += 1
                is_ending = is_ending or num_blamed >= MAX_BLAMED_IN_A_ROW

    def _outcomes(
        self, spans: Iterable[_Span], width: Callable[[int], int]
    ) -> Generator[tuple[_Span, Any], None, None]:
        flown = self._flight.outcomes(spans, lambda span: self._send(span.teacher, span.shards), width)
        with contextlib.closing(flown):
            yield from flown

    def _try_alone(self, task: Task) -> None:
        """Run a suspect with nothing beside it, until it is built or has killed enough workers to be guilty."""
        span = _Span(task[0], (task[1],))
        trial = self._trial = _Trial(task)
        while task in self._remaining and trial.num_deaths < DEATHS_ALONE and trial.num_lost < MAX_FRUITLESS_ROUNDS:
            self._flight.wait_for_workers()
            for _, outcome in self._outcomes([span], _one):
                if isinstance(outcome, Loss):
                    trial = self._trial = trial.with_loss(outcome)
                    self._take_published(span)
                else:
                    self._take(outcome)
        self._trial = None
        if task not in self._remaining:
            return
        self._quarantined.append(replace(trial, said=self._story(trial.said)))
        self._remaining.discard(task)
        self._suspects.discard(task)
        self._in_a_row += 1
        is_hopeless = self._remaining - self._suspects or (self._remaining and not self._has_built)
        if self._in_a_row >= MAX_QUARANTINED_IN_A_ROW and is_hopeless:
            raise self._in_quarantine(
                f"The build stopped after {self._in_a_row} of them in a row: {len(self._remaining)} more shard(s) were "
                f"left ({shard_names(self._remaining)}). What is published is kept"
            ) from self._failures.first

    def _story(self, said: str) -> str:
        """Say what happened: in the words of who watches over the workers, where they can be asked, and in Dask's."""
        with contextlib.suppress(ExecutorError):
            self._flight.wait_for_workers()
            if death := self._flight.last_death():
                return f"The last one {death}"
        return said

    def _take(self, outcomes: Iterable[Record | FailedShard]) -> None:
        for outcome in outcomes:
            task = (outcome.teacher, outcome.shard_index)
            if task not in self._remaining:  # built twice: the first has been counted
                continue
            self._remaining.discard(task)
            self._suspects.discard(task)
            if isinstance(outcome, FailedShard):
                self._failures.add(outcome)
            else:
                self._has_built, self._in_a_row = True, 0
                self._failures.note_success()
                self._on_record(outcome)

    def _take_published(self, span: _Span) -> None:
        """Take what a lost span had published before it was lost."""
        store = CacheStore.at(self._work.address)
        found = (store.record(name, shard) for name, shard in sorted(span.tasks & self._remaining))
        self._take(record for record in found if record is not None)

    def _in_quarantine(self, rest: str) -> ExecutorError:
        failed = f" Besides, {self._failures.in_words()}: {self._failures.first}." if self._failures.first else ""
        self._verdict = ExecutorError(
            f"cache {self._work.address}: {self._listed()}\n{rest}.{failed} Look at the workers' logs: memory "
            "that ran out, or a teacher or dataset that crashes on these rows. Mend that, or give the workers more "
            "memory, and run the same command again: it builds what is missing"
        )
        return self._verdict

    def _listed(self) -> str:
        lines = "".join(f"\n  {self._described(item)}" for item in self._quarantined)
        return (
            f"{len(self._quarantined)} of {self._num_tasks} shard(s) are in quarantine, because their tasks "
            f"killed the workers that they ran on, or were lost with them, alone:{lines}"
        )

    def _found(self) -> str:
        """Say what is known of shards that kill their workers, when the build ends for another reason."""
        found = [self._listed()] if self._quarantined else []
        if self._trial is not None and self._trial.num_lost:
            found.append(f"Suspected, and being tried alone: {self._described(self._trial)}")
        others = self._suspects - ({self._trial.task} if self._trial else set())
        if others:
            found.append(f"Suspected besides, not tried alone yet: {shard_names(others)}")
        return "\n".join(found)

    def _described(self, item: _Trial) -> str:
        name, shard = item.task
        view_index, start, end = self._work.row_map.shard_rows(shard)
        first, last = (self._work.row_map.example_at(row) for row in (start, end - 1))
        lost = f"lost {item.num_lost} times, by no death that Dask tells of"
        died = f"{item.num_deaths} worker(s) died of it" if item.num_deaths else lost
        first_id, last_id = (self._work.transfer_set.example_id(index) for index in (first, last))
        return (
            f"teacher {name!r}, shard {shard}: rows {start} to {end - 1} of view {view_index}, examples {first_id!r} "
            f"to {last_id!r}; {died}. {item.said}"
        )


def from_all_over(items: Sequence[Item]) -> list[Item]:
    """Order items such that the first few, however few, come from everywhere.

    Examples
    --------
    >>> from_all_over(range(8))
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return [items[place] for place in sorted(range(len(items)), key=lambda place: place * _GOLDEN_RATIO % 1)]


def _one(_: int) -> int:
    return 1


def spans_of(work: Work, tasks: set[Task]) -> Iterator[tuple[str, list[int]]]:
    """Group tasks into spans of neighbouring shards that fill at least one inference batch, so none runs twice much."""
    per_span = max(1, -(-2 * work.plan.batch_size // work.plan.cache.shard_rows))
    for name in sorted({name for name, _ in tasks}):
        shards = sorted(shard for other, shard in tasks if other == name)
        for start in range(0, len(shards), per_span):
            yield name, shards[start : start + per_span]
