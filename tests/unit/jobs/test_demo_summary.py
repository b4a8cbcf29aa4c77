"""The demo's verdicts follow the figures, whatever these are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.demo.summary import Effect, Row, find_effects, score_ensemble, score_students, written
from kdcache import Lossless, TransferSet, build_cache
from kdcache.students import Scores, StudentResult, StudentSettings


def row(*errors: float, left_out: tuple[float, ...] = ()) -> Row:
    return Row(group="", name="", errors=errors, left_out_errors=left_out)


def result(temperature: float | None, seed: int, num_errors: int) -> StudentResult:
    return StudentResult(
        sweep="all-examples",
        student_index=0,
        settings=StudentSettings(temperature=temperature, soft_weight=float(temperature is not None), seed=seed),
        weights=Path("weights"),
        num_epochs=1,
        train_loss=0.0,
        test=Scores(num_errors, 200, 0.0),
    )


@pytest.fixture
def rows():
    """Every effect is there."""
    return {
        "teachers": {"alone": row(5.0, 4.0), "geometric": row(3.0)},
        "everything": {None: row(9.0, 8.0), 1.0: row(7.0, 7.0), 4.0: row(6.0, 6.5)},
        "few": {None: row(20.0, 30.0), 4.0: row(15.0, 16.0)},
        "left_out": {
            (False, False): row(16.0, 16.0, left_out=(100.0, 100.0)),
            (False, True): row(20.0, 20.0, left_out=(70.0, 70.0)),
            (True, False): row(7.0, 8.0, left_out=(20.0, 25.0)),
            (True, True): row(6.0, 6.0, left_out=(10.0, 12.0)),
        },
    }


def test_effects_that_are_there_hold(rows):
    assert [effect.holds for effect in find_effects(**rows)] == [True] * 5


def test_each_member_is_compared_with_the_ensemble(rows):
    assert find_effects(**rows)[0].gains == (2.0, 1.0)


def test_every_temperature_is_compared_with_the_hard_labels_of_its_seed(rows):
    assert find_effects(**rows)[1].gains == (2.0, 1.0, 3.0, 1.5)


def test_an_ensemble_no_better_than_its_members_does_not_hold(rows):
    rows["teachers"]["geometric"] = row(4.5)
    assert not find_effects(**rows)[0].holds


def test_soft_targets_no_better_on_few_examples_do_not_hold(rows):
    rows["few"][4.0] = row(20.0, 30.0)
    assert not find_effects(**rows)[2].holds


def test_one_bad_temperature_counts_even_if_another_is_good(rows):
    rows["few"][20.0] = row(90.0, 90.0)
    assert not find_effects(**rows)[2].holds


def test_students_that_know_no_3_do_not_hold(rows):
    rows["left_out"][True, False] = row(7.0, 8.0, left_out=(100.0, 100.0))
    assert not find_effects(**rows)[3].holds


def test_a_correction_that_harms_does_not_hold(rows):
    rows["left_out"][True, True] = row(9.0, 9.0, left_out=(1.0, 1.0))
    assert not find_effects(**rows)[4].holds


def test_a_verdict_gives_the_mean_the_spread_and_the_runs_that_agree():
    effect = Effect.between("it helps", [5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 2.0, 5.0])
    assert str(effect) == "holds: it helps: 2.75 ± 1.89 points fewer, in 3 of 4 comparisons"


def test_a_gain_within_the_spread_over_runs_does_not_hold():
    assert not Effect.between("it helps", [5.0, 5.0, 5.0], [3.0, 4.0, 6.0]).holds


def test_a_verdict_says_when_an_effect_is_missing():
    assert str(Effect.between("it helps", [1.0], [2.0])).startswith("DOES NOT HOLD: it helps")


def test_one_run_has_no_spread():
    assert written([3.25]) == "3.25"


def test_students_are_gathered_by_temperature_in_the_order_of_their_runs():
    results = [result(None, 0, 20), result(None, 1, 10), result(4.0, 0, 8), result(4.0, 1, 6)]
    gathered = score_students(results, group="all examples")
    assert {temperature: row.errors for temperature, row in gathered.items()} == {
        None: pytest.approx((10.0, 5.0)),
        4.0: pytest.approx((4.0, 3.0)),
    }


def test_teachers_are_scored_alone_and_together(tmp_path):
    right, wrong = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 6.0]])
    networks = {name: torch.nn.Linear(1, 2, bias=False) for name in ("a", "b")}
    for network, weight in zip(networks.values(), (right, wrong), strict=True):
        network.weight.data = weight.T.clone()
    examples = TransferSet.from_arrays(torch.ones(4, 1), labels=[0, 0, 0, 1])
    scored = score_ensemble(build_cache(tmp_path / "cache", examples, networks, codec=Lossless()))
    assert scored["alone"].errors == (25.0, 75.0)
    assert scored["geometric"].errors == (75.0,)
