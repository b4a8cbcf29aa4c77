from __future__ import annotations

import pytest

from kdcache.students import StudentSettings, line_up


def names(students: tuple[StudentSettings, ...]) -> list[str]:
    return [student.name for student in students]


def test_a_line_up_holds_every_combination_in_the_order_of_the_sweep(make_sweep):
    sweep = make_sweep(temperatures=(4.0, 2.0), soft_weights=(0.9, 1.0), seeds=(1, 0))
    assert names(line_up(sweep)) == [
        "t4-w0.9-s1",
        "t4-w0.9-s0",
        "t4-w1-s1",
        "t4-w1-s0",
        "t2-w0.9-s1",
        "t2-w0.9-s0",
        "t2-w1-s1",
        "t2-w1-s0",
    ]


def test_on_hard_labels_alone_one_student_a_seed_stands_for_all_temperatures(make_sweep):
    sweep = make_sweep(temperatures=(1.0, 2.0, 4.0), soft_weights=(0.0,), seeds=(0, 1))
    assert names(line_up(sweep)) == ["hard-s0", "hard-s1"]


def test_hard_baselines_stand_beside_softer_students(make_sweep):
    sweep = make_sweep(temperatures=(1.0, 2.0), soft_weights=(0.0, 0.5))
    assert names(line_up(sweep)) == ["hard-s0", "t1-w0.5-s0", "t2-w0.5-s0"]


def test_a_hard_baseline_has_no_temperature(make_sweep):
    (student,) = line_up(make_sweep(soft_weights=(0.0,)))
    assert student == StudentSettings(temperature=None, soft_weight=0.0, seed=0)


def test_logit_matching_knows_no_temperature(make_sweep):
    sweep = make_sweep(temperatures=(1.0, 2.0), divergence="logit-matching")
    assert names(line_up(sweep)) == ["w0.9-s0"]


@pytest.mark.parametrize(
    ("temperature", "name"),
    [(2.5, "t2.5-w0.9-s0"), (20.0, "t20-w0.9-s0"), (1.0000001, "t1.0000001-w0.9-s0"), (1e-7, "t1e-07-w0.9-s0")],
)
def test_a_name_tells_temperatures_apart(temperature, name):
    assert StudentSettings(temperature=temperature, soft_weight=0.9, seed=0).name == name
