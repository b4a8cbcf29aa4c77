from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache import TransferSet
from kdcache.errors import TransferSetError
from kdcache.transfer_set import input_digest

PICTURE = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_digest_has_sixteen_bytes():
    assert len(input_digest(PICTURE)) == 16


def test_a_digest_stays_what_it_was_in_earlier_releases():
    assert input_digest(PICTURE).hex() == "9a4facd2b2aec6216768464ece0cac4f"


@pytest.mark.parametrize(
    "same",
    [
        torch.from_numpy(PICTURE),
        torch.nn.Parameter(torch.from_numpy(PICTURE)),
        PICTURE.copy(order="F"),
        PICTURE.astype(">f4"),
        np.concatenate([PICTURE, PICTURE])[::2][:2] * 0 + PICTURE,
    ],
    ids=["tensor", "parameter", "column-major", "big-endian", "computed"],
)
def test_equal_arrays_have_equal_digests_whatever_holds_them(same):
    assert input_digest(same) == input_digest(PICTURE)


@pytest.mark.parametrize(
    "other",
    [
        PICTURE.reshape(3, 2),
        PICTURE.astype(np.float64),
        PICTURE.view(np.int32),
        PICTURE.view(np.int32).view(">f4"),
        PICTURE + np.float32(1e-6),
        [PICTURE],
        PICTURE.tolist(),
    ],
    ids=["shape", "dtype", "bits read as integers", "bytes read the other way", "values", "within a list", "numbers"],
)
def test_other_inputs_have_other_digests(other):
    assert input_digest(other) != input_digest(PICTURE)


def test_bfloat16_tensors_have_a_digest():
    assert input_digest(torch.ones(2, dtype=torch.bfloat16)) != input_digest(torch.zeros(2, dtype=torch.bfloat16))


def test_the_order_of_a_mappings_keys_does_not_matter():
    assert input_digest({"a": 1, "b": PICTURE}) == input_digest({"b": PICTURE, "a": 1})


def test_the_keys_of_a_mapping_matter():
    assert input_digest({"a": PICTURE}) != input_digest({"b": PICTURE})


def test_tuples_and_lists_are_alike():
    assert input_digest((1, "x")) == input_digest([1, "x"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", 1),
        (b"a", "a"),
        (1, 1.0),
        (True, 1),
        (None, "None"),
        (["ab", "c"], ["a", "bc"]),
        ([[1], 2], [[1, 2]]),
        ([], {}),
    ],
    ids=repr,
)
def test_inputs_that_look_alike_have_other_digests(one, other):
    assert input_digest(one) != input_digest(other)


def test_negative_zero_is_another_input_than_zero():
    assert input_digest(-0.0) != input_digest(0.0)


def test_an_object_that_looks_like_an_array_counts_as_its_array():
    class Picture:
        __array_interface__ = PICTURE.__array_interface__

    assert input_digest(Picture()) == input_digest(PICTURE)


@pytest.mark.parametrize("value", [object(), np.array([object()]), {1, 2}], ids=["object", "array of objects", "set"])
def test_an_input_that_cannot_be_digested_is_refused_with_both_ways_out(value):
    with pytest.raises(
        TransferSetError, match=r"cannot be digested; give\s.*or make the TransferSet with digest_inputs=False"
    ):
        input_digest(value)


@pytest.mark.parametrize(
    "inputs",
    [
        np.arange(12, dtype=np.uint8).reshape(4, 3),
        np.arange(4),
        np.arange(12, dtype=">i4").reshape(4, 3),
        np.arange(24, dtype=np.float32).reshape(4, 3, 2).transpose(0, 2, 1),
        torch.arange(8, dtype=torch.bfloat16).reshape(4, 2),
        torch.tensor([[True], [False], [True], [True]]),
    ],
    ids=["bytes", "scalars", "big-endian", "transposed", "bfloat16", "bool"],
)
def test_digests_of_a_whole_array_are_those_of_its_examples(inputs):
    transfer_set = TransferSet.from_arrays(inputs)
    one_by_one = [transfer_set.digest_of(index) for index in range(4)]
    assert [row.tobytes() for row in transfer_set.input_digests] == one_by_one


def test_an_array_and_a_dataset_have_equal_input_digests():
    inputs = np.random.default_rng(0).normal(size=(5, 3))
    from_array, from_list = TransferSet.from_arrays(inputs), TransferSet(list(inputs))
    assert np.array_equal(from_array.input_digests, from_list.input_digests)


def test_one_changed_input_changes_its_digest_alone():
    inputs = np.zeros((4, 3), np.float32)
    changed = inputs.copy()
    changed[2, 1] = 1
    differs = (TransferSet.from_arrays(inputs).input_digests != TransferSet.from_arrays(changed).input_digests).any(1)
    assert differs.tolist() == [False, False, True, False]


def test_digests_can_be_left_out():
    assert TransferSet.from_arrays(np.zeros((4, 3)), digest_inputs=False).input_digests is None


def test_inputs_that_cannot_be_digested_pass_where_digests_are_left_out():
    assert len(TransferSet([object()], digest_inputs=False, labels=[0]).digest()) == 64


@pytest.mark.parametrize(
    "inputs", [torch.randn(5, 2, 3), torch.arange(5), [PICTURE] * 5], ids=["rows", "numbers", "list"]
)
def test_the_digests_of_several_inputs_are_those_of_each(inputs):
    transfer_set = TransferSet(inputs) if isinstance(inputs, list) else TransferSet.from_arrays(inputs)
    chosen = np.array([3, 0, 3])
    assert transfer_set.digests_of(chosen[:0]) == []
    assert transfer_set.digests_of(chosen) == [transfer_set.digest_of(index) for index in chosen.tolist()]
