from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.stream import epoch_order
from kdcache.stream.order import SequentialOrder, ShuffledOrder, WindowedOrder

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


# Orders that are computed where they are asked for --------------------------------------------------------------------

LARGE = 2**16 + 123
PINNED_OF_A_TRILLION = [784112940698, 937186796023, 559130440120, 535897422844]


@pytest.mark.parametrize("num_examples", [2**16 + 1, LARGE, 2**17])
def test_a_computed_order_is_a_permutation(num_examples):
    order = epoch_order(num_examples, seed=5, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(num_examples))


def test_any_positions_of_a_computed_order_are_those_of_the_whole():
    whole = epoch_order(LARGE, seed=5, epoch=2)
    positions = np.random.default_rng(0).integers(0, LARGE, 1000)
    assert np.array_equal(ShuffledOrder(LARGE, 5, 2).at(positions), whole[positions])


def test_a_computed_order_stays_what_it_was_in_earlier_releases():
    assert ShuffledOrder(10**12, 7, 3).at(np.arange(4)).tolist() == PINNED_OF_A_TRILLION


@pytest.mark.parametrize("num_examples", [40_000, LARGE, 10**6])
def test_places_tell_nothing_of_examples(num_examples):
    """Chi-square of examples over positions, both in 32 parts: as of a true permutation, to five deviations."""
    order = epoch_order(num_examples, seed=1, epoch=0)
    parts = order * 32 // num_examples * 32 + np.arange(num_examples) * 32 // num_examples
    counts = np.bincount(parts, minlength=1024)
    expected = num_examples / 1024
    degrees = 31 * 31
    assert abs(((counts - expected) ** 2 / expected).sum() - degrees) < 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("num_examples", [40_000, LARGE, 10**6])
def test_neighbours_tell_nothing_of_each_other(num_examples):
    order = epoch_order(num_examples, seed=1, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / num_examples**0.5


@pytest.mark.parametrize("num_examples", [40_000, LARGE, 10**6])
def test_epochs_tell_nothing_of_each_other(num_examples):
    first, second = (epoch_order(num_examples, seed=1, epoch=epoch) for epoch in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / num_examples**0.5


# Windows --------------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@given(sizes, st.integers(1, 5), seeds, epochs)
def test_a_windowed_order_is_a_permutation(shard_sizes, window_blocks, seed, epoch):
    first = np.concatenate([[0], np.cumsum(shard_sizes)])
    order = WindowedOrder(first, window_blocks, seed, epoch)
    assert sorted(order.at(np.arange(order.num_examples)).tolist()) == list(range(order.num_examples))


@given(sizes, st.integers(1, 5), seeds, epochs)
def test_a_window_visits_its_own_shards_alone(shard_sizes, window_blocks, seed, epoch):
    first = np.concatenate([[0], np.cumsum(shard_sizes)])
    order = WindowedOrder(first, window_blocks, seed, epoch)
    positions = np.arange(order.num_examples)
    blocks = np.searchsorted(first, order.at(positions), side="right") - 1
    windows = [
        set(part.tolist()) for part in np.split(order.blocks, range(window_blocks, len(order.blocks), window_blocks))
    ]
    allowed = [windows[window] for window in order.window_of(positions)]
    assert all(block in window for block, window in zip(blocks.tolist(), allowed, strict=True))


@given(sizes, st.integers(1, 5), seeds, epochs, st.data())
def test_any_positions_of_a_windowed_order_are_those_of_the_whole(shard_sizes, window_blocks, seed, epoch, data):
    first = np.concatenate([[0], np.cumsum(shard_sizes)])
    whole = WindowedOrder(first, window_blocks, seed, epoch).at(np.arange(first[-1]))
    positions = np.array(data.draw(st.lists(st.integers(0, int(first[-1]) - 1), min_size=1, max_size=9)))
    assert np.array_equal(WindowedOrder(first, window_blocks, seed, epoch).at(positions), whole[positions])


@given(sizes, st.integers(1, 5), seeds, epochs, st.data())
def test_large_windows_are_computed_where_they_are_asked_for(shard_sizes, window_blocks, seed, epoch, data):
    first = np.concatenate([[0], np.cumsum(shard_sizes)])
    start = data.draw(st.integers(0, int(first[-1]) - 1))
    positions = np.arange(start, data.draw(st.integers(start + 1, int(first[-1]))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.stream.order.MATERIALISED_EXAMPLES", 3)
        order = WindowedOrder(first, window_blocks, seed, epoch)
        assert np.array_equal(order.at(positions), order.at(positions[::-1])[::-1])


def test_a_windowed_order_stays_what_it_was_in_earlier_releases():
    order = WindowedOrder(np.array([0, 3, 3, 7, 10, 12]), 2, 7, 3)
    assert order.at(np.arange(12)).tolist() == [11, 7, 10, 8, 9, 1, 0, 2, 6, 4, 5, 3]


def test_several_threads_may_ask_an_order_at_once():
    order = WindowedOrder(np.arange(4001) * 2, 2, 0, 0)
    expected = WindowedOrder(np.arange(4001) * 2, 2, 0, 0).at(np.arange(8000))
    places = np.arange(0, 8000, 4)

    def ask(start):
        return all(np.array_equal(order.at(np.arange(at, at + 4)), expected[at : at + 4]) for at in places[start:])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [True] * 4


def test_windows_of_an_epoch_have_other_shards_than_those_of_the_next():
    first = np.arange(101) * 10
    orders = [WindowedOrder(first, 4, 0, epoch).blocks[:4].tolist() for epoch in range(2)]
    assert orders[0] != orders[1]


def test_without_shuffling_every_example_keeps_its_place():
    assert SequentialOrder(5).at(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
