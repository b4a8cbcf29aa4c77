"""The demo's data: what is learned from, what is tested on, and the subsets of students."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.demo import data


@pytest.fixture(scope="module")
def transfer_set():
    return data.transfer_set()


def test_three_thousand_examples_are_learned_from_and_two_thousand_tested_on(transfer_set):
    inputs, labels = data.test_set()
    assert (len(transfer_set), inputs.shape, labels.shape) == (3000, (2000, 784), (2000,))


def test_no_test_image_is_learned_from(transfer_set):
    learned_from = {image.tobytes() for image in transfer_set.read_inputs(range(3000)).numpy()}
    tested_on = {image.tobytes() for image in data.test_set()[0]}
    assert learned_from.isdisjoint(tested_on)


def test_inputs_run_from_0_to_1(transfer_set):
    inputs = transfer_set.read_inputs(range(3000)).numpy()
    assert (inputs.dtype, inputs.min(), inputs.max()) == (np.float32, 0, 1)


def test_both_parts_hold_every_digit(transfer_set):
    assert np.bincount(transfer_set.labels, minlength=10).min() > 250
    assert np.bincount(data.test_set()[1], minlength=10).min() > 150


def test_an_id_is_the_place_in_mlxtends_file_which_is_sorted_by_digit(transfer_set):
    assert np.array_equal(transfer_set.labels, transfer_set.example_ids // 500)


def test_few_examples_are_distinct_and_drawn_alike_from_equal_seeds(transfer_set):
    first, second = (data.few_examples(transfer_set, number=100, seed=7) for _ in range(2))
    assert len(set(first.tolist())) == 100
    assert np.array_equal(first, second)


def test_other_seeds_draw_other_examples(transfer_set):
    first, second = (set(data.few_examples(transfer_set, number=100, seed=seed).tolist()) for seed in (0, 1))
    assert len(first & second) < 20


def test_without_a_digit_exactly_its_examples_are_missing(transfer_set):
    kept = data.without_digit(transfer_set, digit=3)
    missing = np.setdiff1d(transfer_set.example_ids, kept)
    assert set((missing // 500).tolist()) == {3}
    assert 3 not in kept // 500
