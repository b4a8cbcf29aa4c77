from __future__ import annotations

import pytest
import torch

from benchmarks.teachers import Head, Recorded, load
from benchmarks.teachers.recorded import split_by_example

EXAMPLE_INDEX = torch.tensor([4, 4, 4, 9, 9, 1, 1, 1, 1, 6])


def recorded(**fields):
    fields = {"hidden": torch.eye(10, 3), "head": Head(torch.ones(5, 3), torch.arange(5.0))} | fields
    return Recorded(name="small", kind="main", num_classes=5, example_index=EXAMPLE_INDEX, **fields)


@pytest.mark.parametrize("num_held_out", [0, 1, 3, 5])
def test_exactly_so_many_rows_are_held_out(num_held_out):
    assert len(split_by_example(EXAMPLE_INDEX, num_held_out)[1]) == num_held_out


@pytest.mark.parametrize("seed", range(6))
def test_no_example_is_on_both_sides(seed):
    pilot, held_out = split_by_example(EXAMPLE_INDEX, 4, seed=seed)
    assert not set(EXAMPLE_INDEX[pilot].tolist()) & set(EXAMPLE_INDEX[held_out].tolist())


def test_all_rows_of_examples_not_drawn_are_pilot_rows():
    pilot, held_out = split_by_example(EXAMPLE_INDEX, 4)
    drawn = torch.isin(EXAMPLE_INDEX, EXAMPLE_INDEX[held_out])
    torch.testing.assert_close(pilot, torch.nonzero(~drawn)[:, 0])


def test_the_same_seed_gives_the_same_split():
    torch.testing.assert_close(split_by_example(EXAMPLE_INDEX, 4, seed=3), split_by_example(EXAMPLE_INDEX, 4, seed=3))


def test_other_seeds_give_other_splits():
    assert len({tuple(split_by_example(EXAMPLE_INDEX, 1, seed=seed)[1].tolist()) for seed in range(20)}) > 1


@pytest.mark.parametrize("num_held_out", [-1, 10, 11])
def test_a_split_that_leaves_no_example_to_the_pilot_is_refused(num_held_out):
    with pytest.raises(ValueError, match=f"one must stay; got {num_held_out}"):
        split_by_example(EXAMPLE_INDEX, num_held_out)


def test_logits_follow_from_hidden_states_and_head():
    torch.testing.assert_close(recorded().logits(slice(2, 4)), torch.tensor([[1.0, 2, 3, 4, 5], [0, 1, 2, 3, 4]]))


def test_stored_logits_are_given_as_they_are():
    stored = torch.randn(10, 5)
    torch.testing.assert_close(recorded(stored_logits=stored).logits(torch.tensor([7, 0])), stored[[7, 0]])


def test_logits_that_are_changed_do_not_change_the_recording():
    one = recorded(stored_logits=torch.zeros(10, 5))
    one.logits(slice(None)).fill_(1)
    assert not one.logits(slice(None)).any()


def test_a_recording_without_logits_or_head_is_refused():
    with pytest.raises(ValueError, match="needs logits, or hidden states with a head"):
        recorded(head=None)


def test_fields_with_other_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="token_ids has 3 rows, example_index 10"):
        recorded(token_ids=torch.arange(3))


def test_a_head_with_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"expected 5 classes, got \[4\]"):
        recorded(head=Head(torch.ones(4, 3), None))


def test_an_unknown_teacher_is_refused_by_naming_those_there_are():
    with pytest.raises(SystemExit, match="there is no teacher 'gpt'; there are smollm2, "):
        load("gpt")


def test_an_unknown_kind_of_inputs_is_refused():
    with pytest.raises(SystemExit, match="no kind 'odd'"):
        load("smollm2", kind="odd")
