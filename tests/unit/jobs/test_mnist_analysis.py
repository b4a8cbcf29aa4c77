"""Means, spreads and shares are those of hand-made results."""

from __future__ import annotations

import math

import pytest

from jobs.mnist.analysis import excess, gap_recovered, summaries_by_temperature, summarise
from jobs.mnist.results import Student
from kdcache.errors import JobError


def student(temperature: float | None, seed: int, num_errors: int) -> Student:
    return Student.make(
        sweep="small",
        temperature=temperature,
        soft_weight=1.0,
        seed=seed,
        num_epochs=3,
        errors_by_digit=(num_errors, *[0] * 9),
        lowest_num_errors=num_errors,
    )


STUDENTS = (student(4.0, 0, 10), student(4.0, 1, 14), student(1.0, 0, 13), student(1.0, 1, 19))


def test_the_paper_recovers_91_percent_of_its_gap() -> None:
    assert gap_recovered(hard=146, soft=74, teacher=67) == pytest.approx(0.911, abs=5e-4)


def test_without_a_gap_there_is_no_share_of_it() -> None:
    with pytest.raises(JobError, match="no gap"):
        gap_recovered(hard=70, soft=69, teacher=70)


def test_a_summary_holds_mean_sample_deviation_and_range() -> None:
    summary = summarise([1.0, 2.0, 6.0])
    assert (summary.mean, summary.deviation, summary.low, summary.high, summary.count) == (
        3.0,
        pytest.approx(math.sqrt(7)),
        1.0,
        6.0,
        3,
    )


def test_a_single_value_has_no_deviation() -> None:
    assert math.isnan(summarise([5.0]).deviation)


def test_no_values_have_no_summary() -> None:
    with pytest.raises(JobError, match="no values"):
        summarise([])


def test_temperatures_rise() -> None:
    assert {key: value.mean for key, value in summaries_by_temperature(STUDENTS).items()} == {1.0: 16.0, 4.0: 12.0}


def test_students_of_one_seed_are_compared_with_each_other() -> None:
    assert (excess(STUDENTS, over=4.0)[1.0].low, excess(STUDENTS, over=4.0)[1.0].high) == (3, 5)


def test_students_on_hard_labels_have_no_temperature_to_be_listed_under() -> None:
    assert summaries_by_temperature([*STUDENTS, student(None, 0, 99)]).keys() == {1.0, 4.0}
