"""Rounds over a cluster that is played: which shards are tried when, which are to blame, and what is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_caches import TinyTeacher

from kdcache import TransferSet
from kdcache.build.draft import PlanOptions, make_draft
from kdcache.build.executors.flight import Loss
from kdcache.build.executors.rounds import DEATHS_ALONE, MAX_QUARANTINED_IN_A_ROW, Rounds
from kdcache.errors import ExecutorError

NUM_SHARDS = 60
DEATH = Loss(DEATHS_ALONE, "both died")
VANISHED = Loss(0, "lost")


class PlayedFlight:
    """Builds every shard but some; whatever is under way beside one of those is lost with it."""

    def __init__(self, bad, loss=DEATH, *, num_slots=4):
        self.bad = bad
        self.loss = loss
        self.num_slots = num_slots
        self.num_losses = 0
        self.ended_by = None

    def outcomes(self, spans, send, width):  # noqa: ARG002 - nothing is sent
        waiting = list(spans)
        while waiting and (count := width(self.num_slots)):
            under_way, waiting = waiting[:count], waiting[count:]
            is_deadly = any(self.bad & set(span.shards) for span in under_way)
            self.num_losses += is_deadly
            for span in under_way:
                yield span, self.loss if is_deadly else built(span)

    def wait_for_workers(self):
        if self.ended_by is not None and self.num_losses > 3:
            raise self.ended_by

    def last_death(self):
        return ""


def built(span):
    return [SimpleNamespace(teacher=span.teacher, shard_index=shard) for shard in span.shards]


@pytest.fixture
def work(tmp_path):
    transfer_set = TransferSet.from_arrays(torch.zeros(4 * NUM_SHARDS, 4))
    options = PlanOptions(num_classes=5, batch_size=4, shard_rows=4, chunk_rows=4)
    return make_draft(tmp_path / "cache", transfer_set, {"a": TinyTeacher(0)}, options).work


def run(work, flight):
    records = []
    rounds = Rounds(work, [("a", shard) for shard in range(NUM_SHARDS)], flight, None, records.append)
    try:
        rounds.run()
    finally:
        run.built = sorted(record.shard_index for record in records)


def everything_but(bad):
    return sorted(set(range(NUM_SHARDS)) - set(bad))


def test_a_single_bad_shard_keeps_no_other_from_being_built(work):
    with pytest.raises(ExecutorError, match=r"1 of 60 shard\(s\) are in quarantine"):
        run(work, PlayedFlight({17}))
    assert run.built == everything_but({17})


@pytest.mark.parametrize("start", [0, 20, 40])
def test_many_bad_shards_side_by_side_keep_no_other_from_being_built(work, start):
    bad = set(range(start, start + 20))
    with pytest.raises(ExecutorError, match=r"20 of 60 shard\(s\) are in quarantine"):
        run(work, PlayedFlight(bad))
    assert run.built == everything_but(bad)


def test_every_second_shard_may_be_bad(work):
    bad = set(range(0, NUM_SHARDS, 2))
    with pytest.raises(ExecutorError, match=r"30 of 60 shard\(s\) are in quarantine"):
        run(work, PlayedFlight(bad))
    assert run.built == everything_but(bad)


def test_where_nothing_is_built_few_shards_are_tried(work):
    flight = PlayedFlight(set(range(NUM_SHARDS)))
    with pytest.raises(ExecutorError, match=rf"stopped after {MAX_QUARANTINED_IN_A_ROW} of them in a row: 52 more"):
        run(work, flight)
    assert run.built == []
    assert flight.num_losses < 3 * MAX_QUARANTINED_IN_A_ROW


def test_all_guilty_shards_are_named_with_their_examples(work):
    with pytest.raises(ExecutorError) as caught:
        run(work, PlayedFlight({2, 30}))
    assert caught.match(r"shard 2: rows 8 to 11 of view 0, examples 8 to 11; 2 worker\(s\) died of it. both died")
    assert caught.match(r"shard 30: rows 120 to 123 of view 0, examples 120 to 123")


def test_a_task_that_is_lost_without_a_death_is_not_said_to_have_killed_anyone(work):
    flight = PlayedFlight(set(range(NUM_SHARDS)), VANISHED)
    with pytest.raises(ExecutorError, match=r"lost 3 times, by no death that Dask tells of") as caught:
        run(work, flight)
    assert caught.match(rf"stopped after {MAX_QUARANTINED_IN_A_ROW} of them in a row")
    assert flight.num_losses < 10 * MAX_QUARANTINED_IN_A_ROW


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt(), ExecutorError("the scheduler was lost")])
def test_what_is_known_of_guilty_shards_is_told_however_the_build_ends(work, ended_by):
    flight = PlayedFlight({2, 30})
    flight.ended_by = ended_by
    with pytest.raises(type(ended_by)) as caught:
        run(work, flight)
    assert "Suspected" in caught.value.__notes__[0]
    assert "shard 2: rows 8 to 11" in caught.value.__notes__[0] or "a/2" in caught.value.__notes__[0]


def test_without_bad_shards_nothing_is_raised(work):
    run(work, PlayedFlight(set()))
    assert run.built == everything_but(())
