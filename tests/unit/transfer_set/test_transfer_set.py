from __future__ import annotations

import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch

from kdcache import TransferSet
from kdcache.errors import DuplicateExampleError, TransferSetError, UnknownExampleError

INPUTS = torch.arange(12, dtype=torch.float32).reshape(4, 3)


def transfer_set(**options) -> TransferSet:
    return TransferSet.from_arrays(INPUTS, **options)


# Ids ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[7, 3, 9, -1], ["d", "c", "b", "a"]], ids=["integers", "strings"])
def test_one_id_is_given_as_pythons_own_type(ids):
    assert repr(transfer_set(example_ids=ids).example_id(2)) == repr(ids[2])


def test_without_ids_an_examples_position_is_its_id():
    assert transfer_set().example_ids.tolist() == [0, 1, 2, 3]


def test_positions_as_ids_are_int64():
    assert transfer_set().example_ids.dtype == np.int64


@pytest.mark.parametrize(
    "given",
    [[7, 3, 9, -1], (7, 3, 9, -1), np.array([7, 3, 9, -1], np.int16), torch.tensor([7, 3, 9, -1]), iter([7, 3, 9, -1])],
    ids=["list", "tuple", "ndarray", "tensor", "iterator"],
)
def test_integer_ids_are_kept_as_int64(given):
    ids = transfer_set(example_ids=given).example_ids
    assert (ids.dtype, ids.tolist()) == (np.int64, [7, 3, 9, -1])


@pytest.mark.parametrize("given", [["d", "c", "b", "ä"], np.array(["d", "c", "b", "ä"])], ids=["list", "ndarray"])
def test_string_ids_are_kept_as_python_strings(given):
    assert transfer_set(example_ids=given).example_ids.tolist() == ["d", "c", "b", "ä"]


def test_ids_of_several_types_are_refused():
    with pytest.raises(TransferSetError, match=r"types \['int', 'str'\]; they must be all strings or all integers"):
        transfer_set(example_ids=[1, "2", 3, 4])


@pytest.mark.parametrize("bad", [True, 1.0, None, b"a"])
def test_ids_that_are_neither_integers_nor_strings_are_refused(bad):
    with pytest.raises(TransferSetError, match="must be all strings or all integers"):
        transfer_set(example_ids=[bad] * 4)


def test_an_id_that_does_not_fit_64_bits_is_refused():
    with pytest.raises(TransferSetError, match="does not fit 64 signed bits; use strings"):
        transfer_set(example_ids=[2**63, 0, 1, 2])


def test_another_number_of_ids_than_examples_is_refused():
    with pytest.raises(TransferSetError, match="example_ids has 3 entries for a dataset of 4 examples"):
        transfer_set(example_ids=[1, 2, 3])


@pytest.mark.parametrize("ids", [[5, 6, 5, 5], ["x", "y", "x", "x"]])
def test_duplicate_ids_are_refused_with_their_positions(ids):
    with pytest.raises(DuplicateExampleError) as caught:
        _ = transfer_set(example_ids=ids).example_ids
    assert str(caught.value) == (
        f"2 example_id(s) stand more than once: {ids[0]!r} at positions 0 and 2; {ids[0]!r} at positions 0 and 3. "
        "Ids join soft targets to inputs, so each must be unique; nothing was written. Make them unique and run the "
        "same call again"
    )


def test_of_many_duplicate_ids_five_are_named():
    with pytest.raises(DuplicateExampleError, match=r"^7 example_id\(s\)") as caught:
        _ = TransferSet.from_arrays(torch.zeros(8, 1), example_ids=["same"] * 8).example_ids
    assert str(caught.value).count("positions") == 5


def test_examples_are_found_by_their_ids_in_the_order_asked():
    assert transfer_set(example_ids=["a", "b", "c", "d"]).indices_of(["d", "a", "d"]).tolist() == [3, 0, 3]


def test_an_id_that_is_not_in_the_set_is_named():
    with pytest.raises(UnknownExampleError, match="example_id 'z' is not in this transfer set of 4 examples"):
        transfer_set(example_ids=["a", "b", "c", "d"]).indices_of(["a", "z"])


# Labels and rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [[0, 2, 1, 2], np.array([0, 2, 1, 2], np.uint8), torch.tensor([0, 2, 1, 2])],
    ids=["list", "ndarray", "tensor"],
)
def test_labels_are_kept_as_int64(given):
    labels = transfer_set(labels=given).labels
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 2, 1, 2])


def test_arrays_without_labels_have_none():
    assert transfer_set().labels is None


@pytest.mark.parametrize("labels", [[0.0, 1.0, 2.0, 0.0], ["a", "b", "c", "d"], [None, 0, 1, 2], [[0], [1], [2], [3]]])
def test_labels_that_are_no_class_indices_are_refused(labels):
    with pytest.raises(TransferSetError, match=r"they must be int \[example\]"):
        transfer_set(labels=labels)


def test_another_number_of_labels_than_examples_is_refused():
    with pytest.raises(TransferSetError, match="labels has 5 entries for a dataset of 4 examples"):
        transfer_set(labels=[0] * 5)


def test_an_example_has_one_row_where_nothing_else_is_said():
    assert transfer_set().num_rows.tolist() == [1, 1, 1, 1]


def test_rows_of_sequences_are_kept_as_int32():
    num_rows = transfer_set(num_rows=[3, 1, 2, 5]).num_rows
    assert (num_rows.dtype, num_rows.tolist()) == (np.int32, [3, 1, 2, 5])


@pytest.mark.parametrize("num_rows", [[1, 0, 1, 1], [1, -2, 1, 1], [1.5, 1, 1, 1], [2**31, 1, 1, 1]])
def test_row_counts_below_one_or_no_integers_are_refused(num_rows):
    with pytest.raises(TransferSetError, match="num_rows must be integers of at least 1"):
        transfer_set(num_rows=num_rows)


def test_an_empty_transfer_set_is_refused():
    with pytest.raises(TransferSetError, match="the transfer set is empty; a cache needs at least one example"):
        TransferSet.from_arrays(torch.zeros(0, 3))


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_of_an_array_are_read_as_one_tensor_in_the_order_asked():
    assert torch.equal(transfer_set().read_inputs([2, 0, 2]), INPUTS[[2, 0, 2]])


def test_one_input_is_read_as_the_dataset_gives_it():
    assert torch.equal(transfer_set().read_input(1), INPUTS[1])


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.float16, np.float64, np.bool_, np.complex64]
)
def test_inputs_of_any_numeric_type_are_read_as_they_are(dtype):
    inputs = np.arange(6).reshape(3, 2).astype(dtype)
    assert np.array_equal(TransferSet.from_arrays(inputs).read_inputs([2, 1]).numpy(), inputs[[2, 1]])


def test_inputs_in_bfloat16_are_read_as_they_are():
    inputs = INPUTS.bfloat16()
    assert torch.equal(TransferSet.from_arrays(inputs).read_inputs([3, 1]), inputs[[3, 1]])


@pytest.mark.parametrize(
    "inputs",
    [
        INPUTS.numpy()[::-1],
        INPUTS.numpy()[::-1].astype(">f4"),
        np.broadcast_to(INPUTS.numpy()[::-1], (4, 3)),
        torch.nn.Parameter(INPUTS.flip(0)),
    ],
    ids=["turned around", "big-endian", "read-only", "parameter"],
)
def test_inputs_in_any_memory_layout_read_alike(inputs):
    assert torch.equal(TransferSet.from_arrays(inputs).read_inputs([0, 3]), INPUTS[[3, 0]])


def test_an_array_of_texts_is_refused_with_the_way_to_give_them():
    with pytest.raises(TransferSetError, match=r"dtype <U1; numbers are needed.*TransferSet\(list_of_inputs\)"):
        TransferSet.from_arrays(np.array(["a", "b"]))


class Items:
    """A map-style dataset of given items."""

    def __init__(self, items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_dataset_may_give_bare_inputs():
    assert torch.equal(TransferSet(Items(list(INPUTS))).read_inputs([3, 0]), INPUTS[[3, 0]])


def test_a_dataset_of_bare_inputs_has_no_labels():
    assert TransferSet(Items(list(INPUTS))).labels is None


def test_the_second_item_of_a_tuple_is_the_label_where_it_is_an_integer():
    assert TransferSet(
        Items([(INPUTS[0], 4), (INPUTS[1], np.int64(2)), (INPUTS[2], torch.tensor(1))])
    ).labels.tolist() == [4, 2, 1]


def test_the_second_item_of_a_tuple_is_no_label_where_it_is_no_integer():
    assert TransferSet(Items([(INPUTS[0], 0.5), (INPUTS[1], 0.25)])).labels is None


def test_the_first_item_of_a_tuple_is_the_input():
    assert torch.equal(TransferSet(Items([(INPUTS[0], 4), (INPUTS[1], 2)])).read_inputs([1]), INPUTS[1:2])


def test_input_label_and_id_of_a_tuple_are_where_the_keys_say():
    items = Items([("image-7", 3, INPUTS[0]), ("image-2", 1, INPUTS[1])])
    made = TransferSet(items, input_key=2, label_key=1, id_key=0)
    assert (made.example_ids.tolist(), made.labels.tolist()) == (["image-7", "image-2"], [3, 1])


def test_a_named_tuple_counts_as_a_tuple():
    pair = namedtuple("pair", ["pixels", "digit"])  # noqa: PYI024
    assert TransferSet(Items([pair(INPUTS[0], 4)])).labels.tolist() == [4]


def test_a_label_named_by_a_key_is_never_rounded():
    with pytest.raises(TransferSetError, match=r"example 1 has label 1\.7; labels are class indices"):
        _ = TransferSet(Items([(INPUTS[0], 1), (INPUTS[1], 1.7)]), label_key=1).labels


def test_a_key_beyond_a_tuples_items_is_refused():
    with pytest.raises(TransferSetError, match="example 0 has 2 items, so there is no item 3"):
        _ = TransferSet(Items([(INPUTS[0], 1)]), id_key=3).example_ids


def test_input_label_and_id_of_a_mapping_are_named_by_keys():
    items = Items([{"pixels": INPUTS[0], "digit": 3, "path": "b"}, {"pixels": INPUTS[1], "digit": 1, "path": "a"}])
    made = TransferSet(items, input_key="pixels", label_key="digit", id_key="path")
    assert (made.example_ids.tolist(), made.labels.tolist()) == (["b", "a"], [3, 1])


def test_a_mapping_without_a_named_input_is_refused_with_its_keys():
    with pytest.raises(TransferSetError, match=r"mapping with keys \['digit', 'pixels'\]; say which one is the input"):
        TransferSet(Items([{"pixels": INPUTS[0], "digit": 3}])).read_input(0)


def test_a_mapping_without_a_key_asked_for_is_refused_with_its_keys():
    with pytest.raises(TransferSetError, match=r"example 0 has no key 'digit'; it has \['pixels'\]"):
        _ = TransferSet(Items([{"pixels": INPUTS[0]}]), input_key="pixels", label_key="digit").labels


def test_an_id_that_a_dataset_gives_is_never_rounded():
    with pytest.raises(TransferSetError, match=r"example 0 has example_id 0\.5; ids are strings or integers"):
        _ = TransferSet(Items([(INPUTS[0], 0.5)]), id_key=1).example_ids


def test_ids_given_beside_the_dataset_win_over_those_in_it():
    made = TransferSet(Items([(INPUTS[0], "a")]), id_key=1, example_ids=["b"])
    assert made.example_ids.tolist() == ["b"]


def test_mappings_as_inputs_are_collated_key_by_key():
    items = Items([{"tokens": INPUTS[index], "mask": torch.tensor(index)} for index in range(3)])
    batch = TransferSet(Items([(item, 0) for item in items.items])).read_inputs([2, 0])
    assert (batch["mask"].tolist(), batch["tokens"].shape) == ([2, 0], (2, 3))


def test_inputs_of_unequal_sizes_are_collated_as_told():
    made = TransferSet(Items([torch.ones(2), torch.ones(3)]), collate=torch.nn.utils.rnn.pad_sequence)
    assert made.read_inputs([0, 1]).tolist() == [[1, 1], [1, 1], [0, 1]]


def test_an_iterable_dataset_is_refused_with_the_reason():
    with pytest.raises(TransferSetError, match="a generator is no map-style dataset: it needs __len__ and __getitem__"):
        TransferSet(item for item in INPUTS)


def test_a_dataset_is_read_once_for_labels_ids_and_digests():
    reads = []
    items = Items([(INPUTS[index], index) for index in range(4)])
    items.__class__ = type(
        "Counted", (Items,), {"__getitem__": lambda self, index: reads.append(index) or self.items[index]}
    )
    TransferSet(items, id_key=1).digest()
    assert reads == [0, 1, 2, 3]


# Identity -------------------------------------------------------------------------------------------------------------


def digest(**options) -> str:
    return transfer_set(**options).digest()


def test_equal_transfer_sets_have_equal_digests():
    assert digest(labels=[0, 1, 2, 0]) == digest(labels=np.array([0, 1, 2, 0]))


def test_an_array_and_a_dataset_of_the_same_examples_have_equal_digests():
    items = Items([(row.numpy(), index) for index, row in enumerate(INPUTS)])
    assert TransferSet(items).digest() == digest(labels=[0, 1, 2, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"labels": [0, 1, 2, 1]},
        {"labels": [0, 1, 2, 0], "example_ids": [3, 1, 2, 0]},
        {"labels": [0, 1, 2, 0], "example_ids": ["0", "1", "2", "3"]},
        {"labels": [0, 1, 2, 0], "num_rows": [1, 1, 1, 2]},
        {"labels": [0, 1, 2, 0], "digest_inputs": False},
        {},
    ],
    ids=["labels", "ids", "type of ids", "rows", "no input digests", "no labels"],
)
def test_another_transfer_set_has_another_digest(options):
    assert digest(**options) != digest(labels=[0, 1, 2, 0])


def test_one_changed_input_changes_the_digest():
    changed = INPUTS.clone()
    changed[2, 1] = torch.nextafter(changed[2, 1], torch.tensor(torch.inf))
    assert TransferSet.from_arrays(changed).digest() != digest()


def test_ids_that_only_split_differently_have_other_digests():
    assert digest(example_ids=["ab", "c", "d", "e"]) != digest(example_ids=["a", "bc", "d", "e"])


def test_the_digest_stays_what_it_was_in_earlier_releases():
    assert (
        digest(labels=[0, 1, 2, 0], example_ids=["a", "b", "c", "d"])
        == "ea4fa4965f96ed3f0949a2a0a190979eef65352f06f15d1cb0dbf2690fe66d5c"
    )


@pytest.mark.parametrize("read_before", [False, True])
def test_a_transfer_set_survives_pickling(read_before):
    made = TransferSet(Items([(row, index) for index, row in enumerate(INPUTS)]), example_ids=["a", "b", "c", "d"])
    _ = made.digest() if read_before else None
    assert pickle.loads(pickle.dumps(made)).digest() == made.digest()  # noqa: S301
