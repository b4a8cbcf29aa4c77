"""The certificate measures small losses accurately, and its bounds hold."""

import math

import pytest
import torch

from kdcache.codecs import LADDER, error_range, kl_bound, measure, total_variation_bound
from kdcache.errors import ShapeError, TemperatureError

LOGITS = torch.randn(32, 50, generator=torch.Generator().manual_seed(0)) * 4


def noisy(scale, seed=1):
    return LOGITS + torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(seed)) * scale


def direct(logits, decoded, temperature):
    """KL by its definition, in float64."""
    teacher, student = (torch.log_softmax(values.double() / temperature, dim=1) for values in (logits, decoded))
    return (teacher.exp() * (teacher - student)).sum(1)


def test_the_ladder_is_the_range_the_paper_trains_with():
    assert LADDER == (1.0, 2.0, 4.0, 8.0, 20.0)


@pytest.mark.parametrize("column", range(5))
def test_kl_is_that_of_the_definition(column):
    measured = measure(LOGITS, noisy(0.5))[:, column]
    torch.testing.assert_close(measured, direct(LOGITS, noisy(0.5), LADDER[column]), rtol=1e-9, atol=0.0)


def test_kl_far_below_the_rounding_of_float32_keeps_its_digits():
    logits = LOGITS.double()
    errors = (noisy(1.0) - LOGITS).double()
    tiny, small = (measure(logits, logits + errors * scale, [1.0])[:, 0] for scale in (1e-5, 1e-3))
    torch.testing.assert_close(tiny * 1e4, small, rtol=1e-2, atol=0.0)


def test_kl_is_exactly_zero_where_nothing_was_lost():
    assert not measure(LOGITS, LOGITS.clone()).any()


def test_a_shift_of_a_row_is_no_loss():
    assert float(measure(LOGITS.double(), LOGITS.double() + 1000.0).amax()) < 1e-15


@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("factor", [0.99, 1.0, 1.01])
def test_a_masked_class_that_stays_masked_is_no_loss(masked, factor):
    logits = LOGITS.double()
    logits[:, 7] = masked
    decoded = logits.clone()
    decoded[:, 7] = masked * factor
    assert float(measure(logits, decoded).amax()) < 1e-15


@pytest.mark.parametrize("temperature", LADDER)
def test_a_masked_class_hides_no_loss_of_the_others(temperature):
    logits, decoded = LOGITS.double(), noisy(1e-3).double()
    expected = measure(logits, decoded, [temperature])
    masked = torch.full((32, 1), -1e9, dtype=torch.float64)
    found = measure(torch.cat([logits, masked], 1), torch.cat([decoded, 0.99 * masked], 1), [temperature])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-14)


def test_a_class_lost_altogether_costs_its_gap_times_its_probability():
    measured = measure(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1e9]]), [1.0])
    assert measured.item() == pytest.approx(0.5e9, rel=1e-8)


def test_another_class_on_top_costs_the_whole_gap():
    measured = measure(torch.tensor([[0.0, -1e30]]), torch.tensor([[-1e30, 0.0]]), [1.0])
    assert measured.item() == pytest.approx(1e30, rel=1e-6)


@pytest.mark.parametrize("size", [29.0, 30.0, 31.0, 32.0])
def test_large_and_small_errors_are_measured_alike(size):
    logits = torch.tensor([[0.0, -3.0, -35.0]], dtype=torch.float64)
    decoded = logits + torch.tensor([[0.0, 0.1, size]])
    torch.testing.assert_close(measure(logits, decoded, [1.0])[:, 0], direct(logits, decoded, 1.0), rtol=1e-9, atol=0.0)


def test_kl_of_two_classes_by_hand():
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    measured = measure(torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]]), [1.0])
    assert measured.item() == pytest.approx(expected, rel=1e-6)


def test_wide_rows_are_measured_in_blocks_as_whole():
    logits = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(2))
    decoded = logits + 0.1 * logits.flip(1)
    torch.testing.assert_close(measure(logits, decoded, [2.0])[:, 0], direct(logits, decoded, 2.0), rtol=1e-9, atol=0.0)


def test_a_row_of_nan_measures_nan_and_spoils_no_other():
    decoded = noisy(0.1)
    decoded[3] = float("nan")
    assert measure(LOGITS, decoded).isnan().any(1).nonzero().tolist() == [[3]]


def test_the_arguments_are_left_alone():
    logits, decoded = LOGITS.double(), noisy(0.1).double()
    kept = logits.clone(), decoded.clone()
    measure(logits, decoded)
    error_range(logits, decoded)
    assert torch.equal(logits, kept[0])
    assert torch.equal(decoded, kept[1])


INF = float("inf")


def test_a_class_masked_on_both_sides_hides_no_loss_of_the_others():
    logits, decoded = LOGITS.double(), noisy(1e-3).double()
    gone = torch.full((32, 1), -INF)
    found = measure(torch.cat([logits, gone], 1), torch.cat([decoded, gone], 1))
    torch.testing.assert_close(found, measure(logits, decoded), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("temperature", [1e-9, 1.0, 1e9])
def test_classes_masked_on_both_sides_are_no_loss_at_any_temperature(temperature):
    logits = torch.tensor([[1.0, -INF, 0.5], [-INF, 2.0, -INF]])
    assert not measure(logits, logits.clone(), [temperature]).any()


def test_a_class_that_the_decoded_logits_lost_altogether_costs_infinitely_much():
    assert measure(torch.tensor([[0.0, -3.0]]), torch.tensor([[0.0, -INF]]), [1.0, 20.0]).tolist() == [[INF, INF]]


def test_a_class_of_no_probability_in_float64_may_be_masked():
    assert measure(torch.tensor([[0.0, -1e9]]), torch.tensor([[0.0, -INF]])).tolist() == [[0.0] * 5]


def test_a_masked_class_that_gets_probability_costs_what_the_others_lose():
    found = measure(torch.tensor([[0.0, -INF]]), torch.tensor([[0.0, 0.0]]), [1.0])
    assert found.item() == pytest.approx(math.log(2))


def test_the_error_range_leaves_out_what_is_masked_on_both_sides():
    logits = torch.tensor([[1.0, -INF, 3.0], [-INF, -INF, 0.0]])
    assert error_range(logits, logits + torch.tensor([10.0, 0.0, 10.25])).tolist() == [0.25, 0.0]


def test_the_error_range_is_infinite_where_a_class_is_masked_on_one_side():
    logits = torch.tensor([[1.0, -INF], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    decoded = torch.tensor([[1.0, 0.0], [1.0, -INF], [-INF, -INF], [1.0, 0.0]])
    assert error_range(logits, decoded).tolist() == [INF, INF, INF, 0.0]


def test_nan_beside_a_masked_class_measures_nan():
    logits = torch.tensor([[0.0, -INF, 1.0]])
    assert measure(logits, torch.tensor([[math.nan, -INF, 1.0]]), [1.0]).isnan().all()


def test_the_error_range_is_the_spread_of_the_errors():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert error_range(logits, logits + torch.tensor([[10.0, 9.5, 10.25]])).tolist() == [0.75]


def test_the_kl_bound_is_hoeffdings():
    assert kl_bound(torch.tensor([2.0]), 4.0).tolist() == [4 / (8 * 16)]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_total_variation_bound_is_attained_by_two_even_classes(temperature):
    true, decoded = torch.tensor([0.3, 0.0]), torch.tensor([0.0, 0.3])
    attained = (torch.softmax(true / temperature, 0) - torch.softmax(decoded / temperature, 0)).abs().sum() / 2
    assert total_variation_bound(torch.tensor(0.6), temperature).item() == pytest.approx(attained.item(), rel=1e-6)


@pytest.mark.parametrize("call", [measure, error_range])
def test_arrays_of_different_shapes_are_refused(call):
    with pytest.raises(ShapeError, match=r"got \(32, 50\) and \(31, 50\)"):
        call(LOGITS, LOGITS[1:])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), True, "4", None])
def test_temperatures_that_are_not_finite_and_positive_are_refused(temperature):
    with pytest.raises(TemperatureError, match="finite number above 0"):
        measure(LOGITS, LOGITS, [1.0, temperature])


@pytest.mark.parametrize("bound", [kl_bound, total_variation_bound])
def test_bounds_refuse_a_temperature_of_zero(bound):
    with pytest.raises(TemperatureError, match="got 0"):
        bound(torch.tensor([1.0]), 0)
