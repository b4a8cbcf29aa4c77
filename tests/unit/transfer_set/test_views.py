from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from kdcache import TransferSet
from kdcache.errors import TransferSetError
from kdcache.transfer_set import Views, view_generator


def add_noise(value, generator):
    return value + torch.from_numpy(generator.normal(size=value.shape).astype(np.float32))


INPUTS = torch.arange(12, dtype=torch.float32).reshape(4, 3)
VIEWS = Views(transform=add_noise, num_views=3, name="noise-1", seed=5)


@pytest.fixture
def transfer_set():
    return TransferSet.from_arrays(INPUTS, views=VIEWS, example_ids=["a", "b", "c", "d"])


def test_a_transfer_set_without_views_has_one():
    assert TransferSet.from_arrays(INPUTS).num_views == 1


def test_a_transfer_set_has_the_views_asked_for(transfer_set):
    assert transfer_set.num_views == 3


def test_a_view_reads_the_same_each_time(transfer_set):
    assert torch.equal(transfer_set.read_input(1, view_index=2), transfer_set.read_input(1, view_index=2))


def test_the_views_of_an_example_differ(transfer_set):
    assert not torch.equal(transfer_set.read_input(1, view_index=0), transfer_set.read_input(1, view_index=1))


def test_a_view_does_not_depend_on_what_was_read_before(transfer_set):
    one_by_one = torch.stack([transfer_set.read_input(index, view_index=1) for index in (3, 0, 2, 1)])
    assert torch.equal(transfer_set.read_inputs([0, 1, 2, 3], view_index=1), one_by_one[[1, 3, 2, 0]])


def test_a_view_follows_the_id_and_not_the_position(transfer_set):
    turned = TransferSet.from_arrays(INPUTS.flip(0), views=VIEWS, example_ids=["d", "c", "b", "a"])
    assert torch.equal(turned.read_input(0, view_index=2), transfer_set.read_input(3, view_index=2))


def test_another_seed_gives_another_view(transfer_set):
    other = Views(transform=add_noise, num_views=3, name="noise-1", seed=6)
    reseeded = TransferSet.from_arrays(INPUTS, views=other, example_ids=["a", "b", "c", "d"])
    assert not torch.equal(reseeded.read_input(0), transfer_set.read_input(0))


def test_a_pickled_transfer_set_gives_the_same_views(transfer_set):
    again = pickle.loads(pickle.dumps(transfer_set))  # noqa: S301
    assert torch.equal(again.read_input(2, view_index=1), transfer_set.read_input(2, view_index=1))


def test_integer_ids_give_the_generator_of_a_plain_integer():
    transfer_set = TransferSet.from_arrays(INPUTS, views=VIEWS, example_ids=[7, 8, 9, 10])
    expected = add_noise(INPUTS[2], view_generator(5, 9, 1))
    assert torch.equal(transfer_set.read_input(2, view_index=1), expected)


def test_digests_are_of_the_inputs_before_any_view(transfer_set):
    assert np.array_equal(transfer_set.input_digests, TransferSet.from_arrays(INPUTS).input_digests)


def test_no_views_at_all_are_refused():
    with pytest.raises(TransferSetError, match="num_views is 0; at least 1 is needed"):
        Views(transform=add_noise, num_views=0, name="none")


def test_a_views_randomness_stays_what_it_was_in_earlier_releases():
    assert view_generator(5, "a", 1).integers(0, 1000, 4).tolist() == [874, 564, 205, 434]


@pytest.mark.parametrize("other", [(6, "a", 1), (5, "b", 1), (5, "a", 2), (5, "a|1", 1)], ids=repr)
def test_seed_id_and_view_each_change_the_randomness(other):
    assert view_generator(*other).integers(0, 2**62) != view_generator(5, "a", 1).integers(0, 2**62)


def test_a_number_and_its_text_are_two_ids():
    assert view_generator(0, 7, 0).integers(0, 2**62) != view_generator(0, "7", 0).integers(0, 2**62)
