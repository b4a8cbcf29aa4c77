"""Bounds by hand, their edges, and what they refuse."""

import pytest
import torch

from kdcache.codecs import kl_bound, scaled_bounds
from kdcache.errors import ShapeError

LOGITS = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 4


def noisy(logits):
    return logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * 0.1


def wide():
    return torch.randn(3, 9000, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("logits", [LOGITS, wide()])
def test_a_row_without_errors_is_bounded_by_zero(logits):
    assert not scaled_bounds(logits, logits.clone()).any()


def test_two_even_classes_pushed_apart_are_bounded_near_half_the_variance():
    bounds = scaled_bounds(torch.zeros(1, 2), torch.tensor([[0.001, -0.001]]))
    torch.testing.assert_close(bounds, torch.full((1, 3), 0.5e-6, dtype=torch.float64), rtol=1e-3, atol=0.0)


def test_no_bound_is_above_hoeffdings():
    decoded = LOGITS + 60 * torch.rand(LOGITS.shape, generator=torch.Generator().manual_seed(3))
    errors = decoded.double() - LOGITS.double()
    hoeffding = kl_bound(errors.amax(1) - errors.amin(1), 1.0)
    assert bool((scaled_bounds(LOGITS, decoded) <= hoeffding[:, None] * (1 + 1e-6)).all())


def test_float32_and_float64_agree():
    logits = wide()
    single, double = scaled_bounds(logits, noisy(logits)), scaled_bounds(logits.double(), noisy(logits).double())
    torch.testing.assert_close(single, double, rtol=3e-2, atol=0.0)


def test_rounding_only_widens_the_bound_of_float32():
    logits = wide()
    decoded = noisy(logits)
    assert bool((scaled_bounds(logits, decoded) >= scaled_bounds(logits.double(), decoded.double())).all())


def test_numbers_that_float32_cannot_hold_are_bounded_in_float64():
    logits = wide()
    logits[0, 0], logits[0, 1] = 3e38, -3e38
    assert bool(scaled_bounds(logits, logits * 0.9).isfinite().all())


@pytest.mark.parametrize("logits", [LOGITS, wide()])
@pytest.mark.parametrize("side", [0, 1])
def test_a_class_masked_on_one_side_only_has_no_bound(logits, side):
    pair = logits.clone(), noisy(logits)
    pair[side][1, 7] = -torch.inf
    assert scaled_bounds(*pair).isinf().any(1).nonzero().tolist() == [[1]]


def test_a_row_of_nan_spoils_no_other():
    decoded = noisy(LOGITS)
    decoded[3, 4] = torch.nan
    assert scaled_bounds(LOGITS, decoded).isnan().any(1).nonzero().tolist() == [[3]]


def test_no_rows_have_no_bounds():
    assert scaled_bounds(LOGITS[:0], LOGITS[:0]).shape == (0, 3)


def test_the_arguments_are_left_alone():
    logits, decoded = LOGITS.double(), noisy(LOGITS).double()
    kept = logits.clone(), decoded.clone()
    scaled_bounds(logits, decoded)
    assert torch.equal(logits, kept[0])
    assert torch.equal(decoded, kept[1])


def test_half_precision_is_bounded_as_its_values():
    logits = LOGITS.bfloat16()
    assert torch.equal(scaled_bounds(logits, LOGITS), scaled_bounds(logits.float(), LOGITS))


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"got \(8, 50\) and \(7, 50\)"):
        scaled_bounds(LOGITS, LOGITS[1:])
