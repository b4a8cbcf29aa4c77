from __future__ import annotations

import pickle

import pytest
import torch
from tiny_caches import tiny_transfer_set

from kdcache import Codes, Lossless, Spectral, build_cache, plan_cache
from kdcache.build import curve
from kdcache.build.curve import break_even_rows, spectral_parameter_bytes
from kdcache.codecs import fitted_codec

NUM_ROWS, NUM_CLASSES = 400, 40


class WideTeacher(torch.nn.Linear):
    """Forty classes, whose logits have four components."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(4, NUM_CLASSES)
        torch.nn.init.normal_(self.weight, std=2)


def planned(folder, **options):
    return plan_cache(folder / "cache", tiny_transfer_set(NUM_ROWS), {"a": WideTeacher()}, **options).teachers[0]


def bases(forecast) -> list:
    return [point for point in forecast.points if isinstance(point.codec, Spectral)]


# break-even -----------------------------------------------------------------------------------------------------------


def test_parameters_are_paid_back_by_what_each_row_saves():
    assert break_even_rows(1000, 10, other_bytes_per_row=110) == 10


def test_at_the_break_even_the_codec_is_no_larger_and_one_row_before_it_is():
    rows = break_even_rows(1001, 10, other_bytes_per_row=17, other_parameter_bytes=5)
    assert 1001 + 10 * rows <= 17 * rows + 5
    assert 1001 + 10 * (rows - 1) > 17 * (rows - 1) + 5


@pytest.mark.parametrize("other", [10, 9.5])
def test_rows_that_save_nothing_never_pay(other):
    assert break_even_rows(1000, 10, other_bytes_per_row=other) is None


def test_smaller_parameters_and_smaller_rows_pay_at_once():
    assert break_even_rows(10, 5, other_bytes_per_row=6, other_parameter_bytes=20) == 0


def test_equal_rows_with_no_more_parameters_pay_at_once():
    assert break_even_rows(10, 5, other_bytes_per_row=5, other_parameter_bytes=10) == 0


def test_the_bytes_of_a_basis_are_those_its_parameters_have():
    logits = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    codec, parameters = fitted_codec(Spectral(), 7, logits)
    assert sum(array.nbytes for array in parameters.values()) == spectral_parameter_bytes(7, codec.num_components)


# the points of a plan -------------------------------------------------------------------------------------------------


def test_a_plan_measures_a_basis_at_five_targets(tmp_path):
    targets = sorted(point.codec.max_kl for point in bases(planned(tmp_path, max_kl=0.01)))
    assert targets == pytest.approx([0.01 / 16, 0.01 / 4, 0.01, 0.04, 0.16])


def test_targets_above_the_largest_are_left_out(tmp_path):
    targets = [point.codec.max_kl for point in bases(planned(tmp_path, codec=Spectral(max_kl=0.1)))]
    assert max(targets) == pytest.approx(0.4)


def test_every_target_is_met(tmp_path):
    for point in bases(planned(tmp_path, max_kl=0.01)):
        assert max(point.certificate.mean_kl[:3]) <= point.codec.max_kl


def test_larger_targets_take_fewer_bytes(tmp_path):
    points = sorted(bases(planned(tmp_path, max_kl=0.01)), key=lambda point: point.codec.max_kl)
    sizes = [point.bytes_per_row for point in points]
    assert sizes == sorted(sizes, reverse=True)


def test_a_fixed_step_is_measured_beside_others(tmp_path):
    steps = sorted(point.codec.step for point in bases(planned(tmp_path, codec=Spectral(step=0.002))))
    assert steps == pytest.approx([0.0005, 0.001, 0.002, 0.004, 0.008])


def test_one_point_is_the_choice(tmp_path):
    forecast = planned(tmp_path, max_kl=0.01)
    (choice,) = [point for point in forecast.points if point.is_choice]
    assert (choice.codec, choice.bytes_per_row) == (forecast.codec, forecast.bytes_per_row)


def test_codes_are_measured_beside_a_basis_that_was_asked_for(tmp_path):
    assert Codes() in [point.codec for point in planned(tmp_path, codec=Spectral()).points]


def test_codes_are_measured_once(tmp_path):
    assert [point.codec for point in planned(tmp_path, max_kl=0.01).points].count(Codes()) == 1


@pytest.mark.parametrize("codec", [Codes(), Lossless()])
def test_without_a_basis_there_is_one_point(tmp_path, codec):
    assert [point.codec for point in planned(tmp_path, codec=codec).points] == [codec]


def test_a_wide_basis_is_also_measured_at_half_and_a_quarter_of_its_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "WIDE_BASIS_BYTES", 100)
    assert {point.codec.rank for point in bases(planned(tmp_path, max_kl=0.01))} == {4, 2, 1}


def test_a_cut_rank_keeps_less_and_has_smaller_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "WIDE_BASIS_BYTES", 100)
    points = bases(planned(tmp_path, max_kl=0.01))
    (full,) = [point for point in points if point.is_choice]
    (half,) = [point for point in points if point.codec.rank == 2]
    assert half.certificate.mean_kl[0] > full.certificate.mean_kl[0]
    assert half.parameter_bytes < full.parameter_bytes


def test_a_build_measures_nothing_beside_its_choice(tmp_path, monkeypatch):
    def refused(*_):
        raise AssertionError

    monkeypatch.setattr("kdcache.build.pilot.further_candidates", refused)
    build_cache(tmp_path / "cache", tiny_transfer_set(NUM_ROWS), {"a": WideTeacher()}, max_kl=0.01)
    with pytest.raises(AssertionError):
        planned(tmp_path / "other", max_kl=0.01)


def test_a_forecast_travels(tmp_path):
    forecast = planned(tmp_path, max_kl=0.01)
    assert pickle.loads(pickle.dumps(forecast)) == forecast  # noqa: S301 - as Dask sends it


def test_a_budget_that_a_basis_misses_tells_what_it_would_cost(tmp_path):
    with pytest.raises(ValueError, match=r"basis of 4, max_kl \S+ \S+ bytes a row"):
        planned(tmp_path, bytes_per_row=0.5)
