"""Histograms add without loss, and their quantiles are close from above."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kdcache.documents import Histogram
from kdcache.errors import DocumentError

VALUES = np.random.default_rng(0).lognormal(-8, 3, 1000).tolist()


def test_halves_add_up_to_the_whole():
    assert Histogram.merged([Histogram.of(VALUES[:300]), Histogram.of(VALUES[300:])]) == Histogram.of(VALUES)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_adding_changes_nothing(order):
    parts = [Histogram.of(VALUES[place::3]) for place in order]
    assert Histogram.merged(parts).to_json() == Histogram.of(VALUES).to_json()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
def test_a_quantile_is_above_its_rows_and_not_far(share):
    true = float(np.quantile(VALUES, share, method="inverted_cdf"))
    assert true <= Histogram.of(VALUES).quantile(share, largest=max(VALUES)) <= true * 2**0.25 * (1 + 1e-12)


def test_no_quantile_is_above_the_largest():
    assert Histogram.of([1.05, 1.1]).quantile(0.99, largest=1.1) == 1.1


@pytest.mark.parametrize("bin_number", [-200, -5, -1, 0, 1, 2, 3, 4, 17, 400])
def test_a_lower_edge_belongs_to_its_bin(bin_number):
    assert Histogram.of([2.0 ** (bin_number / 4) * (1 + 1e-12)]).first_bin == bin_number


def test_zeros_and_what_no_one_can_measure_are_counted_together():
    assert Histogram.of([0.0, 1e-17]) == Histogram.make(num_zeros=2)


def test_the_quantile_of_zeros_is_zero():
    assert Histogram.of([0.0, 0.0]).quantile(0.99, largest=0.0) == 0


def test_the_largest_number_is_counted():
    largest = float(np.finfo(np.float64).max)
    assert Histogram.of([largest]).quantile(0.99, largest=largest) == largest


@pytest.mark.parametrize(
    "fields",
    [{"first_bin": 0, "counts": (0, 1)}, {"first_bin": 0, "counts": (1, 0)}, {"first_bin": 3}],
)
def test_a_histogram_can_be_written_in_one_way_only(fields):
    with pytest.raises(DocumentError):
        Histogram.make(num_zeros=1, **fields)
