"""The parts of the transfer set hold the examples that their names say."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.mnist.examples import drawn_at_random, of_classes, without_classes
from kdcache import TransferSet
from kdcache.errors import JobError

LABELS = [3, 1, 7, 8, 3, 0, 7]
IDS = [10, 11, 12, 13, 14, 15, 16]


def transfer_set(labels: list[int] | None = LABELS) -> TransferSet:
    return TransferSet.from_arrays(np.zeros((7, 2), dtype=np.float32), labels=labels, example_ids=IDS)


def test_classes_can_be_left_out() -> None:
    assert without_classes(transfer_set=transfer_set(), classes=[3]).tolist() == [11, 12, 13, 15, 16]


def test_classes_can_be_all_there_is() -> None:
    assert of_classes(transfer_set=transfer_set(), classes=[7, 8]).tolist() == [12, 13, 16]


def test_a_draw_has_the_size_asked_for_and_nothing_twice() -> None:
    assert len(set(drawn_at_random(transfer_set=transfer_set(), num_examples=4, seed=0).tolist()) & set(IDS)) == 4


def test_a_draw_depends_on_its_seed_alone() -> None:
    first, second = (drawn_at_random(transfer_set=transfer_set(), num_examples=4, seed=5) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_another_seed_draws_other_examples() -> None:
    draws = {tuple(drawn_at_random(transfer_set=transfer_set(), num_examples=3, seed=seed)) for seed in range(5)}
    assert len(draws) > 1


@pytest.mark.parametrize("num_examples", [0, 8])
def test_a_draw_of_more_than_there_is_or_of_nothing_is_refused(num_examples: int) -> None:
    with pytest.raises(JobError, match=f"num_examples is {num_examples}; expected 1 to 7"):
        drawn_at_random(transfer_set=transfer_set(), num_examples=num_examples, seed=0)


def test_classes_cannot_be_told_apart_without_labels() -> None:
    with pytest.raises(JobError, match="has no labels"):
        of_classes(transfer_set=transfer_set(labels=None), classes=[7])
