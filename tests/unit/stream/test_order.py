from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.stream import epoch_order

seeds = st.integers(0, 2**64)
epochs = st.integers(0, 10**6)


@given(st.integers(1, 500), seeds, epochs)
def test_an_epochs_order_is_a_permutation(num_examples, seed, epoch):
    assert sorted(epoch_order(num_examples, seed=seed, epoch=epoch)) == list(range(num_examples))


@given(st.integers(1, 100), seeds, epochs)
def test_an_epochs_order_is_the_same_each_time(num_examples, seed, epoch):
    one, other = (epoch_order(num_examples, seed=seed, epoch=epoch) for _ in range(2))
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (0, 0, [7, 6, 1, 5, 3, 8, 0, 2, 9, 4]),
        (0, 1, [7, 4, 3, 9, 6, 5, 2, 1, 0, 8]),
        (1, 0, [4, 9, 3, 7, 6, 0, 5, 2, 1, 8]),
        (123456789, 41, [6, 4, 0, 7, 9, 8, 2, 5, 1, 3]),
    ],
)
def test_an_epochs_order_stays_what_it_was_in_earlier_releases(seed, epoch, order):
    assert epoch_order(10, seed=seed, epoch=epoch).tolist() == order


def test_epochs_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed=3, epoch=epoch)) for epoch in range(20)}
    assert len(orders) == 20


def test_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed=seed, epoch=3)) for seed in range(20)}
    assert len(orders) == 20


def test_seed_and_epoch_are_not_confused():
    assert epoch_order(50, seed=1, epoch=12).tolist() != epoch_order(50, seed=11, epoch=2).tolist()


def test_every_example_comes_first_in_some_epoch():
    assert {int(epoch_order(5, seed=0, epoch=epoch)[0]) for epoch in range(60)} == set(range(5))
