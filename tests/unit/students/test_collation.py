"""Ids around a data collator: taken out before it, put back behind it, and nothing else."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from kdcache.errors import TransferSetError
from kdcache.students.collation import CollatesIds


def names_and_numbers(examples):
    """A collator that knows numbers alone, and says what it was given."""
    return {"keys": sorted(examples[0]), "number": [example["number"] for example in examples]}


COLLATE = CollatesIds(names_and_numbers, "example_id")


def examples_with(ids):
    return [{"number": place, "example_id": example_id} for place, example_id in enumerate(ids)]


def test_the_collator_never_sees_the_ids():
    assert COLLATE(examples_with(["a", "b"])) == {"keys": ["number"], "number": [0, 1], "example_id": ["a", "b"]}


@pytest.mark.parametrize("as_id", [int, np.int64, np.uint8, torch.tensor])
def test_integer_ids_become_a_tensor_of_int64(as_id):
    ids = COLLATE(examples_with([as_id(7), as_id(3)]))["example_id"]
    assert (ids.dtype, ids.tolist()) == (torch.int64, [7, 3])


def test_text_ids_stay_a_list():
    assert COLLATE(examples_with([np.str_("a"), "b"]))["example_id"] == ["a", "b"]


def test_the_examples_are_not_changed():
    examples = examples_with(["a"])
    COLLATE(examples)
    assert examples == examples_with(["a"])


def test_examples_without_ids_are_collated_as_they_are():
    assert COLLATE([{"number": 3}]) == {"keys": ["number"], "number": [3]}


def test_examples_of_another_kind_are_collated_as_they_are():
    assert CollatesIds(list, "example_id")([3, 4]) == [3, 4]


def test_an_id_that_is_missing_is_refused():
    with pytest.raises(TransferSetError, match="1 of 2 examples of a batch have no 'example_id'"):
        COLLATE([{"number": 0, "example_id": 3}, {"number": 1}])


@pytest.mark.parametrize("ids", [[1, "a"], [1.0], [None], [True], [[1]]])
def test_what_is_no_id_is_refused(ids):
    with pytest.raises(TransferSetError, match="the ids under 'example_id' are of types"):
        COLLATE(examples_with(ids))


class Collator:
    tokenizer = "the tokenizer"

    def __call__(self, examples):
        return {"examples": examples}


def test_other_attributes_are_the_collators():
    assert CollatesIds(Collator(), "example_id").tokenizer == "the tokenizer"


def test_an_attribute_that_nobody_has_is_an_attribute_error():
    assert not hasattr(COLLATE, "nothing")


def test_a_worker_can_be_given_one():
    copied = pickle.loads(pickle.dumps(COLLATE))  # noqa: S301 - our own
    assert copied(examples_with(["a"])) == COLLATE(examples_with(["a"]))
