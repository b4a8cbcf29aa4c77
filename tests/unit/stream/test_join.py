"""Soft targets on the batches of any loader: joined by what the batches hold, refused where that is something else."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from echoes import decoded, echo_cache, is_joined
from identified import (
    NUM_EXAMPLES,
    NUMBERS,
    Examples,
    input_of,
    loader_of,
    mapping_item,
    name_of,
    numbers_of,
    same_number,
    tuple_item,
)
from tiny_caches import build_tiny, tiny_teachers, tiny_transfer_set
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from kdcache import SoftTargets, TransferSet, open_cache
from kdcache.errors import (
    DuplicateExampleError,
    InputMismatchError,
    NoStateError,
    OptionError,
    ShapeError,
    TransferSetError,
    UnknownExampleError,
    UnknownTeacherError,
)
from kdcache.transfer_set import Views

pytestmark = pytest.mark.filterwarnings(  # torchdata 0.11 calls what torch 2.13 has deprecated
    "ignore:'set_vital' is deprecated:UserWarning"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("join") / "cache"
    echo_cache(folder)
    return folder


@pytest.fixture
def cache(built):
    return open_cache(built)


@pytest.fixture(params=["memory", "shards"])
def tier(request):
    return {"max_resident_bytes": 2**20 if request.param == "memory" else 0}


def all_joined(batches) -> bool:
    return all(is_joined(batch["input"], batch["soft_targets"]) for batch in batches)


def one_batch(numbers, **entries: Any) -> list[dict[str, Any]]:
    inputs = torch.stack([input_of(number) for number in numbers])
    return [{"input": inputs, "example_id": [name_of(number) for number in numbers], **entries}]


# By content -----------------------------------------------------------------------------------------------------------


def test_every_batch_gets_the_soft_targets_of_its_inputs(cache, tier):
    assert all_joined(cache.join(loader_of(shuffle=True), **tier))


def test_every_example_is_given_once(cache):
    given = list(itertools.chain(*numbers_of(cache.join(loader_of(shuffle=True)))))
    assert sorted(given) == list(range(NUM_EXAMPLES))


def test_integer_ids_are_joined(tmp_path, tier):
    cache = echo_cache(tmp_path / "cache", id_of=same_number)
    assert all_joined(cache.join(loader_of(Examples(id_of=same_number), shuffle=True), **tier))


@pytest.mark.parametrize("as_ids", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_integer_ids_may_be_of_any_kind(tmp_path, as_ids):
    cache = echo_cache(tmp_path / "cache", id_of=same_number)
    assert all_joined(cache.join(one_batch([5, 3, 9], example_id=as_ids([5, 3, 9]))))


@pytest.mark.parametrize("as_ids", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_string_ids_may_be_of_any_kind(cache, as_ids):
    assert all_joined(cache.join(one_batch([5, 3, 9], example_id=as_ids(["picture-5", "picture-3", "picture-9"]))))


@pytest.mark.parametrize(("context", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_the_loader_change_nothing(cache, context, num_workers):
    joined = cache.join(loader_of(shuffle=True, num_workers=num_workers, multiprocessing_context=context))
    assert all_joined(joined)


def test_persistent_workers_serve_every_epoch(cache):
    joined = cache.join(loader_of(shuffle=True, num_workers=2, persistent_workers=True))
    assert all(all_joined(joined) for _ in range(3))


def with_process(number, example_id):
    return {**mapping_item(number, example_id), "process": os.getpid()}


def test_persistent_workers_are_the_same_in_every_epoch(cache):
    joined = cache.join(loader_of(Examples(item=with_process), num_workers=2, persistent_workers=True))
    processes = [{number for batch in joined for number in batch["process"].tolist()} for _ in range(2)]
    assert processes[0] == processes[1]
    assert os.getpid() not in processes[0]


def test_persistent_workers_survive_an_epoch_that_is_left_early(cache):
    joined = cache.join(loader_of(num_workers=2, persistent_workers=True))
    next(iter(joined))
    assert numbers_of(joined) == numbers_of(loader_of())


def test_two_ranks_get_the_soft_targets_of_their_own_examples(cache):
    samplers = [DistributedSampler(NUMBERS, num_replicas=2, rank=rank, seed=3) for rank in range(2)]
    batches = [batch for sampler in samplers for batch in cache.join(loader_of(sampler=sampler))]
    assert sorted(itertools.chain(*numbers_of(batches))) == list(range(NUM_EXAMPLES))
    assert all_joined(batches)


def test_a_generator_of_batches_is_joined(cache):
    assert all_joined(cache.join(batch for batch in loader_of()))


def test_an_iterable_dataset_is_joined(cache):
    class Stream(IterableDataset):
        def __iter__(self):
            return (mapping_item(number, name_of(number)) for number in NUMBERS)

    joined = cache.join(DataLoader(Stream(), batch_size=7))
    assert (all_joined(joined), joined.looks_ahead) == (True, False)


def test_a_loader_that_accelerate_prepared_is_joined(cache):
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(loader_of(shuffle=True))
    joined = cache.join(prepared)
    assert (all_joined(joined), joined.looks_ahead) == (True, False)


def test_rows_that_are_not_built_yet_are_masked(tmp_path):
    folder = tmp_path / "cache"
    echo_cache(folder)
    (folder / "complete.json").unlink()
    (folder / "commits" / "echo" / "0.json").unlink()
    (batch,) = open_cache(folder, allow_incomplete=True).join(one_batch([3, 20]))
    assert batch["soft_targets"].available.tolist() == [False, True]


def test_the_order_is_that_of_the_loader_alone(cache):
    torch.manual_seed(3)
    alone = numbers_of(loader_of(shuffle=True))
    torch.manual_seed(3)
    assert numbers_of(cache.join(loader_of(shuffle=True))) == alone


def test_an_empty_batch_gets_no_rows(cache):
    (batch,) = cache.join([{"example_id": []}])
    assert len(batch["soft_targets"]) == 0


# Kinds of batches -----------------------------------------------------------------------------------------------------


class Triple(NamedTuple):
    input: torch.Tensor
    label: Any
    example_id: Any


class Quadruple(NamedTuple):
    input: torch.Tensor
    example_id: Any
    soft_targets: Any = None


@dataclass(frozen=True)
class Batch:
    input: torch.Tensor
    example_id: list[str]
    soft_targets: SoftTargets | None = None


@dataclass(frozen=True)
class Bare:
    input: torch.Tensor
    example_id: list[str]


class Plain:
    def __init__(self, numbers):
        self.input = torch.stack([input_of(number) for number in numbers])
        self.example_id = [name_of(number) for number in numbers]


INPUTS = torch.stack([input_of(number) for number in (5, 3, 9)])
IDS = ["picture-5", "picture-3", "picture-9"]


def test_a_list_of_default_collate_gets_a_last_item(cache):
    batches = list(cache.join(loader_of(Examples(item=tuple_item)), key=2))
    assert {type(batch) for batch in batches} == {list}
    assert all(is_joined(inputs, soft_targets) for inputs, _, _, soft_targets in batches)


def test_a_tuple_gets_a_last_item(cache):
    ((inputs, ids, soft_targets),) = cache.join([(INPUTS, IDS)], key=-1)
    assert (is_joined(inputs, soft_targets), ids) == (True, IDS)


def test_a_named_tuple_gets_a_last_field(cache):
    (batch,) = cache.join([Triple(INPUTS, None, IDS)])
    assert batch._fields == ("input", "label", "example_id", "soft_targets")
    assert is_joined(batch.input, batch.soft_targets)


def test_batches_of_named_tuples_are_all_of_one_kind(cache):
    assert len({type(batch) for batch in cache.join([Triple(INPUTS, None, IDS)] * 3)}) == 1


def test_a_named_tuple_with_the_field_keeps_its_kind(cache):
    (batch,) = cache.join([Quadruple(INPUTS, IDS)])
    assert type(batch) is Quadruple
    assert is_joined(batch.input, batch.soft_targets)


def test_a_dataclass_gets_its_field_set(cache):
    (batch,) = cache.join([Batch(INPUTS, IDS)])
    assert type(batch) is Batch
    assert is_joined(batch.input, batch.soft_targets)


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_stays_of_its_kind(cache, kind):
    (batch,) = cache.join([kind(input=INPUTS, example_id=IDS)])
    assert type(batch) is kind
    assert is_joined(batch["input"], batch["soft_targets"])


def test_a_batch_of_transformers_stays_one(cache):
    from transformers import BatchEncoding

    (batch,) = cache.join([BatchEncoding({"input": INPUTS, "example_id": IDS})])
    assert type(batch) is BatchEncoding
    assert is_joined(batch["input"], batch["soft_targets"])


def test_the_loaders_own_batch_is_not_changed(cache):
    given = {"input": INPUTS, "example_id": IDS}
    list(cache.join([given]))
    assert list(given) == ["input", "example_id"]


def test_callables_read_and_write_any_other_kind(cache):
    joined = cache.join([Plain([5, 3])], key=lambda batch: batch.example_id, put=lambda batch, soft: (batch, soft))
    ((batch, soft_targets),) = joined
    assert is_joined(batch.input, soft_targets)


def test_an_attribute_names_the_ids_of_any_object(cache):
    ((batch, soft_targets),) = cache.join([Plain([5, 3])], put=lambda batch, soft_targets: (batch, soft_targets))
    assert is_joined(batch.input, soft_targets)


def test_soft_targets_may_have_another_name(cache):
    (batch,) = cache.join([{"input": INPUTS, "example_id": IDS}], name="teachers")
    assert is_joined(batch["input"], batch["teachers"])


@pytest.mark.parametrize(
    "batch",
    [
        {"example_id": IDS, "soft_targets": 3},
        {"example_id": IDS, "soft_targets": None},
        Batch(INPUTS, IDS, 3),
        Quadruple(INPUTS, IDS, 3),
    ],
    ids=["mapping", "mapping of None", "dataclass", "named tuple"],
)
def test_what_stands_under_the_name_is_not_overwritten(cache, batch):
    with pytest.raises(OptionError, match=r"have an entry 'soft_targets' already.*name='soft_targets_of_teachers'"):
        list(cache.join([batch]))


def test_a_dataclass_without_the_field_is_told_what_to_do(cache):
    with pytest.raises(OptionError, match=r"give Bare a field `soft_targets: SoftTargets \| None = None`, or put="):
        list(cache.join([Bare(INPUTS, IDS)]))


def test_another_object_is_told_what_to_do(cache):
    with pytest.raises(OptionError, match=r"batches are Plain objects.*give put=callable\(batch, soft_targets\)"):
        list(cache.join([Plain([5])]))


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ({"image": 1}, "example_id", r"no entry key='example_id': a batch is a dict with the keys \['image'\]"),
        ([INPUTS, IDS], "example_id", r"a batch is a list with 2 entries: give a position, such as key=1"),
        ([INPUTS, IDS], 2, r"no entry key=2"),
        (Plain([1]), "name", r"a Plain with no such attribute: give key=callable\(batch\)"),
    ],
    ids=["mapping", "list by name", "list too short", "object"],
)
def test_a_batch_without_the_key_is_refused(cache, batch, key, message):
    with pytest.raises(OptionError, match=message):
        list(cache.join([batch], key=key))


# What is read ---------------------------------------------------------------------------------------------------------


def test_some_teachers_alone_can_be_read(tmp_path):
    cache = build_tiny(tmp_path / "cache", teachers=tiny_teachers(3))
    (batch,) = cache.join([{"example_id": [3, 1]}], teachers=["c", "a"])
    assert batch["soft_targets"].teacher_names == ("c", "a")


def test_a_teacher_that_is_not_there_is_refused_at_once(cache):
    with pytest.raises(UnknownTeacherError, match="no teacher"):
        cache.join([], teachers=["b"])


def test_a_view_is_read(tmp_path):
    views = Views(transform=lambda value, generator: value * float(generator.normal()), num_views=2, name="scale")
    transfer_set = tiny_transfer_set(views=views)
    cache = build_tiny(tmp_path / "cache", transfer_set)
    (batch,) = cache.join([{"example_id": [3, 1]}], view_index=1)
    assert torch.equal(batch["soft_targets"].logits(), cache.read([3, 1], view_index=1).logits())


def test_a_view_that_is_not_there_is_refused_at_once(cache):
    with pytest.raises(ShapeError, match="there is no view 2"):
        cache.join([], view_index=2)


LENGTHS = [index % 3 + 1 for index in range(10)]


class PositionTeacher(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def test_sequences_say_how_many_rows_each_has(tmp_path, tier):
    inputs = torch.arange(120, dtype=torch.float32).reshape(10, 3, 4)
    transfer_set = TransferSet.from_arrays(inputs, num_rows=LENGTHS)
    cache = build_tiny(tmp_path / "cache", transfer_set, {"positions": PositionTeacher()})
    (batch,) = cache.join([{"example_id": [4, 2, 0]}], **tier)
    expected = torch.cat([inputs[4, :2], inputs[2, :3], inputs[0, :1]])
    assert batch["soft_targets"].num_rows.tolist() == [2, 3, 1]
    assert torch.equal(decoded(batch["soft_targets"]).argsort(), expected.argsort())
    assert torch.equal(batch["soft_targets"].logits(), cache.read([4, 2, 0]).logits())


def test_sequences_of_one_row_each_say_so_too(tmp_path):
    transfer_set = TransferSet.from_arrays(torch.randn(10, 3, 4), num_rows=LENGTHS)
    cache = build_tiny(tmp_path / "cache", transfer_set, {"positions": PositionTeacher()})
    (batch,) = cache.join([{"example_id": [0, 3]}])
    assert batch["soft_targets"].num_rows.tolist() == [1, 1]


def test_batches_go_to_the_device(cache):
    (batch,) = cache.join([{"input": INPUTS, "example_id": IDS}], device="cpu")
    assert (batch["soft_targets"].device.type, is_joined(batch["input"], batch["soft_targets"])) == ("cpu", True)


@pytest.mark.parametrize(
    "batch",
    [{"input": INPUTS, "example_id": IDS}, UserDict(input=INPUTS, example_id=IDS), Batch(INPUTS, IDS)],
    ids=["dict", "other mapping", "dataclass"],
)
def test_batches_that_are_moved_stay_of_their_kind(cache, batch):
    (moved,) = cache.join([batch], device="cpu")
    assert type(moved) is type(batch)


@pytest.mark.accelerator
def test_batches_are_moved_to_an_accelerator(cache):
    for batch in cache.join(loader_of(shuffle=True), device="cuda"):
        assert {batch["input"].device.type, batch["soft_targets"].device.type} == {"cuda"}
        assert is_joined(batch["input"], batch["soft_targets"])


# What is refused ------------------------------------------------------------------------------------------------------


def test_unknown_ids_are_refused_at_the_first_batch(cache):
    with pytest.raises(UnknownExampleError, match=r"batch 1 of the loader joined with cache .*'picture-99'.*No batch"):
        next(iter(cache.join(one_batch([3, 99]))))


def test_unknown_ids_are_refused_where_they_were_read_ahead(cache):
    with pytest.raises(UnknownExampleError, match=r"batch 2 of the loader"):
        list(cache.join(loader_of(Examples([0, 1, 2, 99]), batch_size=2)))


def test_ids_of_another_type_are_refused(cache):
    with pytest.raises(UnknownExampleError, match=r"Its ids are string. You gave int64 ids; convert them"):
        list(cache.join([{"example_id": torch.tensor([3, 4])}]))


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), [None], torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64)])
def test_what_is_no_list_of_ids_is_refused(cache, ids):
    with pytest.raises(TransferSetError, match=r"batch 1 of the loader joined with cache .*: its ids cannot be read"):
        list(cache.join([{"example_id": ids}]))


def test_an_id_twice_in_a_batch_is_refused(cache):
    with pytest.raises(DuplicateExampleError, match=r"the id 'picture-3' stands more than once.*allow_repeats=True"):
        list(cache.join(one_batch([3, 5, 3])))


def test_repeats_can_be_allowed(cache):
    assert all_joined(cache.join(one_batch([3, 5, 3]), allow_repeats=True))


def test_other_labels_are_refused(cache):
    with pytest.raises(
        InputMismatchError,
        match=r"1 of 2 labels differ.*'picture-5' has 2 in the batch and 1 in the cache.*label_key=None",
    ):
        list(cache.join(one_batch([3, 5], labels=torch.tensor([3, 2]))))


def test_labels_are_compared_in_every_batch(cache):
    batches = one_batch([3], label=[3]) + one_batch([5], label=[2])
    with pytest.raises(InputMismatchError, match="batch 2 of the loader"):
        list(cache.join(batches))


def test_labels_need_not_be_compared(cache):
    assert all_joined(cache.join(one_batch([3, 5], labels=torch.tensor([0, 0])), label_key=None))


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2),
        ["a", "b"],
        torch.zeros(3, dtype=torch.int64),
        [[1], [2, 3]],
    ],
    ids=["of sequences", "mixed", "texts", "of others", "ragged"],
)
def test_what_is_no_label_an_example_is_left_alone(cache, labels):
    assert all_joined(cache.join(one_batch([3, 5], labels=labels)))


def test_labels_at_a_position_are_compared_where_it_is_named(cache):
    with pytest.raises(InputMismatchError, match="3 of 3 labels differ"):
        list(cache.join([(INPUTS, torch.tensor([0, 0, 0]), IDS)], key=2, label_key=1))


def test_labels_that_are_a_field_are_compared(cache):
    batch = Triple(INPUTS, torch.tensor([0, 0, 0]), IDS)
    with pytest.raises(InputMismatchError, match="3 of 3 labels differ"):
        list(cache.join([batch]))


def test_named_labels_must_be_labels(cache):
    with pytest.raises(OptionError, match=r"the entry label_key='labels' is not one integer label for each of its 2"):
        list(cache.join(one_batch([3, 5], labels=torch.zeros(2, 4)), label_key="labels"))


def test_named_labels_need_labels_in_the_cache(tmp_path):
    cache = build_tiny(tmp_path / "cache", tiny_transfer_set(labels=None))
    with pytest.raises(OptionError, match="keeps no labels to compare with"):
        cache.join([], label_key="labels")


def test_labels_of_a_cache_without_any_are_left_alone(tmp_path):
    cache = build_tiny(tmp_path / "cache", tiny_transfer_set(labels=None))
    assert len(list(cache.join([{"example_id": [3], "labels": [9]}]))) == 1


def test_the_inputs_that_the_teachers_saw_are_taken(cache):
    assert all_joined(cache.join(loader_of(shuffle=True), input_key="input"))


def test_changed_inputs_are_refused(cache):
    dataset = Examples(item=lambda number, example_id: {"input": input_of(number) + 1, "example_id": example_id})
    with pytest.raises(InputMismatchError, match=r"batch 1 .*the input of example 'picture-3' is not the one"):
        list(cache.join(loader_of(dataset), input_key="input"))


def test_any_changed_input_of_the_first_batch_is_refused(cache):
    batches = one_batch([5, 3, 9])
    batches[0]["input"][2] += 1
    with pytest.raises(InputMismatchError, match="the input of example 'picture-9'"):
        list(cache.join(batches, input_key="input"))


def test_changed_inputs_of_a_later_batch_are_refused(cache):
    batches = one_batch([5, 3]) + one_batch([9, 1])
    batches[1]["input"] += 1
    with pytest.raises(InputMismatchError, match="batch 2 of the loader"):
        list(cache.join(batches, input_key="input"))


@pytest.mark.parametrize("as_inputs", [list, torch.Tensor.numpy], ids=["list", "array"])
def test_inputs_may_be_a_sequence_of_one_an_example(cache, as_inputs):
    batches = [{"input": as_inputs(INPUTS), "example_id": IDS}]
    assert len(list(cache.join(batches, input_key="input"))) == 1


def test_inputs_may_be_a_mapping(tmp_path):
    dataset = [np.arange(4, dtype=np.float32) * number for number in range(10)]
    transfer_set = TransferSet([({"a": values}, 0) for values in dataset], input_key=0)

    class FromMapping(torch.nn.Module):
        def forward(self, a):
            return a

    cache = build_tiny(tmp_path / "cache", transfer_set, {"a": FromMapping()})
    batch = {"inputs": {"a": torch.from_numpy(np.stack([dataset[3], dataset[1]]))}, "example_id": [3, 1]}
    assert len(list(cache.join([batch], input_key="inputs"))) == 1
    batch["inputs"]["a"][1] += 1
    with pytest.raises(InputMismatchError, match="the input of example 1 "):
        list(cache.join([batch], input_key="inputs"))


@pytest.mark.parametrize("inputs", [INPUTS[:2], 7, "text"], ids=["too few", "number", "text"])
def test_inputs_must_be_one_an_example(cache, inputs):
    with pytest.raises(OptionError, match=r"what input_key names holds .* for 3 examples"):
        list(cache.join([{"input": inputs, "example_id": IDS}], input_key="input"))


def test_inputs_need_digests_in_the_cache(tmp_path):
    cache = echo_cache(tmp_path / "cache", digest_inputs=False)
    with pytest.raises(OptionError, match="keeps no input digests"):
        cache.join([], input_key="input")


def test_an_iterator_that_is_used_up_is_refused(cache):
    joined = cache.join(iter(one_batch([3])))
    list(joined)
    with pytest.raises(OptionError, match="an iterator that has been used up"):
        list(joined)


def test_an_iterator_that_was_left_goes_on(cache):
    joined = cache.join(iter(one_batch([3]) + one_batch([5])))
    next(iter(joined))
    assert numbers_of(joined) == [[5]]


# What the loader is asked ---------------------------------------------------------------------------------------------


def test_as_many_batches_as_the_loader_has(cache):
    assert len(cache.join(loader_of())) == 6


def test_a_loader_without_a_length_has_none(cache):
    with pytest.raises(TypeError, match="has no len"):
        len(cache.join(iter([])))


def test_other_attributes_are_the_loaders(cache):
    loader = loader_of()
    assert (cache.join(loader).dataset, cache.join(loader).batch_size) == (loader.dataset, 7)


def test_an_attribute_that_nobody_has_is_an_attribute_error(cache):
    assert not hasattr(cache.join(loader_of()), "nothing")


def test_the_epoch_is_told_to_the_sampler(cache):
    sampler = DistributedSampler(NUMBERS, num_replicas=1, rank=0, seed=3)
    joined = cache.join(loader_of(sampler=sampler))
    joined.set_epoch(4)
    assert sampler.epoch == 4


def test_the_epoch_is_told_to_a_loader(cache):
    class Loader(list):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

    loader = Loader()
    cache.join(loader).set_epoch(2)
    assert loader.epoch == 2


def test_the_epoch_may_be_of_interest_to_nobody(cache):
    joined = cache.join(loader_of())
    joined.set_epoch(2)
    assert all_joined(joined)


def test_what_is_joined_shows_itself(cache):
    assert repr(cache.join(loader_of())).startswith("JoinedBatches(DataLoader with SoftTargetCache(")


# States ---------------------------------------------------------------------------------------------------------------


def shuffled_and_stateful(cache, num_workers):
    options = {"batch_size": 7, "shuffle": True, "num_workers": num_workers}
    return cache.join(StatefulDataLoader(Examples(), generator=torch.Generator().manual_seed(5), **options))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_after_a_batch_goes_on_behind_it(cache, num_workers):
    undisturbed = numbers_of(shuffled_and_stateful(cache, num_workers))
    first = shuffled_and_stateful(cache, num_workers)
    iterator = iter(first)
    given = [next(iterator) for _ in range(2)]
    second = shuffled_and_stateful(cache, num_workers)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert numbers_of(given + rest) == undisturbed
    assert all_joined(given + rest)


def test_a_loader_without_state_says_what_to_use(cache):
    with pytest.raises(NoStateError, match=r"torch.utils.data.dataloader.DataLoader, which keeps no state.*Stateful"):
        cache.join(loader_of()).state_dict()


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_a_loader_without_state_does_not_pretend_to_have_one(cache, method):
    assert not hasattr(cache.join(loader_of()), method)


# Look-ahead -----------------------------------------------------------------------------------------------------------


def look_ahead_threads():
    """Those that are left once they had time to end: nobody waits for the threads of a loop themselves."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("kdcache-join")]
    for thread in threads:
        thread.join(30)
    return [thread.name for thread in threads if thread.is_alive()]


class Readings:
    """Counts in which threads a cache is read."""

    def __init__(self, cache, monkeypatch):
        self.threads = []
        read_rows = cache.read_rows

        def counting(*arguments, **options):
            self.threads.append(threading.current_thread().name.split("_")[0])
            return read_rows(*arguments, **options)

        monkeypatch.setattr(cache, "read_rows", counting)


@pytest.fixture
def readings(cache, monkeypatch):
    return Readings(cache, monkeypatch)


AHEAD = ["kdcache-join"]


def test_batches_whose_ids_are_known_are_read_ahead(cache, readings):
    list(cache.join(loader_of(shuffle=True)))
    assert readings.threads == AHEAD * 6


def test_ids_may_be_given_for_the_look_ahead(cache, readings):
    dataset = Examples(knows_ids=False)
    list(cache.join(loader_of(dataset), example_ids=[name_of(number) for number in NUMBERS]))
    assert readings.threads == AHEAD * 6


def test_a_part_of_a_dataset_is_read_ahead(cache, readings):
    joined = cache.join(loader_of(Subset(Examples(), [5, 3, 8])))
    assert all_joined(joined)
    assert readings.threads == AHEAD


def test_every_batch_is_read_once_with_workers(cache, readings):
    joined = cache.join(loader_of(shuffle=True, num_workers=2, persistent_workers=True))
    assert all_joined(itertools.chain(joined, joined))
    assert readings.threads == AHEAD * 12


def test_without_ids_by_position_batches_are_read_as_they_come(cache, readings):
    joined = cache.join(loader_of(Examples(knows_ids=False)))
    assert (all_joined(joined), joined.looks_ahead) == (True, False)
    assert readings.threads == ["MainThread"] * 6


def test_other_classes_of_loaders_are_not_looked_ahead_of(cache, readings):
    assert all_joined(cache.join(StatefulDataLoader(Examples(), batch_size=7)))
    assert readings.threads == ["MainThread"] * 6


def test_ids_that_were_foretold_wrongly_do_no_harm(cache, readings):
    wrong = [name_of(number) for number in reversed(NUMBERS)]
    assert all_joined(cache.join(loader_of(shuffle=True), example_ids=wrong))
    assert readings.threads.count("MainThread") == 6


def test_ids_that_were_foretold_and_are_unknown_do_no_harm(cache):
    assert all_joined(cache.join(loader_of(), example_ids=[f"{number}" for number in NUMBERS]))


def turned(items):
    return torch.utils.data.default_collate(items[::-1])


def thinned(items):
    return torch.utils.data.default_collate(items[::2])


@pytest.mark.parametrize("collate", [turned, thinned])
def test_collation_may_reorder_and_leave_out(cache, collate):
    assert all_joined(cache.join(loader_of(collate_fn=collate)))


class Pairs:
    """A batch sampler of things that are no positions."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class AnyIndex(Examples):
    def __getitem__(self, index):
        return super().__getitem__(index[0] if isinstance(index, tuple) else int(index) % len(self))


@pytest.mark.parametrize(
    "batches",
    [[[(0, 1), (2, 5)], [(3, 1)]], [[1, 2], [NUM_EXAMPLES + 3]], [["1", "2"]], [[torch.tensor(3), torch.tensor(4)]]],
    ids=["pairs", "beyond", "texts", "tensors"],
)
def test_a_sampler_may_hand_out_what_is_no_position(cache, batches):
    assert all_joined(cache.join(DataLoader(AnyIndex(), batch_sampler=Pairs(batches))))


def test_batches_may_arrive_in_another_order(cache):
    assert all_joined(cache.join(loader_of(num_workers=2, in_order=False, batch_size=2)))


def test_an_attribute_that_holds_no_ids_is_not_taken_for_ids(cache):
    dataset = Examples(knows_ids=False)
    dataset.example_ids = [None] * NUM_EXAMPLES
    assert not cache.join(loader_of(dataset)).looks_ahead


def test_no_more_is_read_than_the_workers_were_given(cache, readings):
    joined = cache.join(loader_of(batch_size=1, num_workers=2, prefetch_factor=2))
    iterator = iter(joined)
    next(iterator)
    assert len(readings.threads) <= 2 * 2 + 1
    iterator.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_thread_is_left_by_an_epoch(cache, num_workers):
    list(cache.join(loader_of(num_workers=num_workers)))
    assert look_ahead_threads() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_thread_is_left_by_an_epoch_that_is_left_early(cache, num_workers):
    for _ in cache.join(loader_of(num_workers=num_workers)):
        break
    assert look_ahead_threads() == []


def test_no_thread_is_left_by_an_error(cache):
    with pytest.raises(UnknownExampleError):
        list(cache.join(loader_of(Examples([0, 99]), batch_size=1)))
    assert look_ahead_threads() == []


def test_two_passes_at_once_do_not_meet(cache):
    joined = cache.join(loader_of(shuffle=True))
    assert all(
        is_joined(one["input"], one["soft_targets"]) and is_joined(other["input"], other["soft_targets"])
        for one, other in zip(joined, joined, strict=True)
    )


def test_the_users_loader_is_not_changed(cache):
    loader = loader_of(shuffle=True, num_workers=2, persistent_workers=True)
    before = dict(vars(loader))
    list(cache.join(loader))
    assert vars(loader) == before


def test_as_many_ids_are_needed_as_there_are_examples(cache):
    with pytest.raises(OptionError, match="example_ids has 2 ids for a dataset of 40 examples"):
        cache.join(loader_of(), example_ids=["picture-1", "picture-2"])


def test_ids_are_refused_where_nothing_can_be_read_ahead(cache):
    with pytest.raises(OptionError, match=r"the loader is a torchdata.*StatefulDataLoader.*Leave example_ids out"):
        cache.join(StatefulDataLoader(Examples(), batch_size=7), example_ids=[name_of(number) for number in NUMBERS])
