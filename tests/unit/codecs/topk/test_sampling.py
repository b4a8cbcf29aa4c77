"""Sampling without replacement: thresholds, uniform numbers from content, systematic draws."""

import pytest
import torch

from kdcache.codecs.topk.sampling import inclusion_probabilities, systematic_sample, thresholds, uniforms

INFINITE = float("inf")


def gaps(num_rows=20, num_classes=100, scale=4.0):
    return torch.rand(num_rows, num_classes, generator=torch.Generator().manual_seed(0)) * scale**2


@pytest.mark.parametrize("num_samples", [1, 5, 50, 99])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_the_threshold_keeps_as_many_classes_on_average_as_are_wanted(num_samples, temperature):
    threshold = thresholds(gaps(), num_samples, temperature)
    total = inclusion_probabilities(gaps().double(), threshold, temperature).sum(1)
    torch.testing.assert_close(total, torch.full((20,), float(num_samples), dtype=torch.float64), rtol=1e-4, atol=0.0)


def test_rows_with_no_more_classes_than_are_wanted_keep_them_all():
    few = gaps().index_fill(1, torch.arange(6, 100), INFINITE)
    assert bool((thresholds(few, 6, 2.0) == INFINITE).all())
    assert bool((thresholds(few, 5, 2.0) < INFINITE).all())


def test_a_class_that_must_not_be_kept_has_probability_zero():
    few = gaps().index_fill(1, torch.tensor([3]), INFINITE).double()
    assert not inclusion_probabilities(few, thresholds(few.float(), 5, 2.0), 2.0)[:, 3].any()


def test_a_class_far_above_all_others_is_kept_for_certain_and_the_rest_shared_out():
    row = torch.tensor([[0.0, 500.0, 500.0, 500.0]])
    found = inclusion_probabilities(row.double(), thresholds(row, 2, 1.0), 1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / 3, 1 / 3, 1 / 3]]).double(), rtol=1e-4, atol=0.0)


def test_systematic_draws_take_the_classes_in_whose_stretch_a_point_lies():
    probabilities = torch.tensor([[0.5, 0.25, 1.0, 0.25], [0.5, 0.25, 1.0, 0.25]])
    drawn = systematic_sample(probabilities, torch.tensor([0.1, 0.4]).double(), 2)
    assert drawn.tolist() == [[2, 3], [1, 2]]


def test_places_that_stay_empty_hold_the_number_of_classes():
    drawn = systematic_sample(torch.tensor([[0.5, 0.25]]), torch.tensor([0.0]).double(), 2)
    assert drawn.tolist() == [[2, 2]]


def test_uniform_numbers_of_many_seeds_and_rows_are_uniform():
    content = torch.arange(40)[:, None].expand(40, 3).contiguous()
    numbers = torch.stack([uniforms(content, seed) for seed in range(500)])
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    counts = torch.histc(numbers.flatten(), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 44  # chi-square of 19 degrees, one in a thousand
    correlations = torch.corrcoef(numbers.T) - torch.eye(40, dtype=torch.float64)
    assert float(correlations.abs().amax()) < 0.2


def test_equal_content_gives_equal_numbers_and_any_change_another():
    content = torch.tensor([[5, 6, 7], [5, 6, 7], [6, 5, 7], [5, 6, 8]])
    numbers = uniforms(content, 3).tolist()
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 3
