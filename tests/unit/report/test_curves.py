from __future__ import annotations

from kdcache.report.curves import Curve, Point, gather_curves


def line(error: float | None, **fields):
    return {"sweep": "s", "soft_weight": 0.9, "temperature": 4.0, "seed": 0, "test_error": error, **fields}


def test_seeds_are_gathered_into_points():
    (curve,) = gather_curves([line(0.1), line(0.3, seed=1)])
    assert curve == Curve("s", 0.9, (Point(4.0, (0.1, 0.3)),))


def test_the_last_epoch_of_a_student_counts():
    (curve,) = gather_curves([line(0.5, epoch=1), line(0.1, epoch=2)])
    assert curve.points == (Point(4.0, (0.1,)),)


def test_points_stand_by_rising_temperature():
    (curve,) = gather_curves([line(0.1, temperature=8.0), line(0.2, temperature=1.0)])
    assert curve.temperatures == [1.0, 8.0]


def test_sweeps_keep_their_order_and_soft_weights_rise():
    curves = gather_curves([line(0.1, sweep="b"), line(0.1, sweep="a"), line(0.1, sweep="b", soft_weight=0.5)])
    assert [(curve.sweep, curve.soft_weight) for curve in curves] == [("b", 0.5), ("b", 0.9), ("a", 0.9)]


def test_a_baseline_is_level():
    (curve,) = gather_curves([line(0.1, soft_weight=0.0, temperature=None)])
    assert curve.is_level
    assert curve.temperatures == []


def test_lines_without_a_test_error_are_passed_over():
    assert gather_curves([line(None), {"sweep": "s", "epoch": 1}]) == []


def test_a_point_knows_its_mean_and_spread():
    point = Point(4.0, (0.25, 0.75, 0.5))
    assert (point.mean, point.low, point.high) == (0.5, 0.25, 0.75)
