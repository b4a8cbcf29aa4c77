from __future__ import annotations

import copy
import itertools
import json
import pickle
import threading
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny_caches import OneAtATime, TinyTeacher, build_tiny, tiny_inputs, tiny_labels, tiny_teachers, tiny_transfer_set
from torch import nn

from kdcache import Codes, SoftTargetLoader, TransferSet, open_cache
from kdcache.errors import (
    CorruptCacheError,
    InputMismatchError,
    OptionError,
    ShapeError,
    TransferSetError,
    UnknownExampleError,
    UnknownTeacherError,
)
from kdcache.stream import epoch_order
from kdcache.transfer_set import Views

INTEGER_IDS = [(11 * index) % 40 for index in range(40)]
STRING_IDS = [f"image-{number}" for number in INTEGER_IDS]


class Echo(nn.Module):
    """A teacher whose logits are its input: soft targets tell which example they belong to."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()


def echo_cache(folder, transfer_set=None, **options):
    return build_tiny(folder, transfer_set or tiny_transfer_set(), {"echo": Echo()}, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "cache"
    echo_cache(folder)
    return folder


@pytest.fixture
def cache(built):
    return open_cache(built)


@pytest.fixture(params=["memory", "windows", "scattered", "mapped", "device"])
def tier(request, tmp_path):
    options = {
        "windows": {"window_bytes": 300, "shuffle": "windowed"},
        "mapped": {"local_copy": tmp_path / "copy"},
        "device": {"device": "cpu"},
    }
    return {"tier": request.param, **options.get(request.param, {})}


def loader_of(cache, inputs=None, **options) -> SoftTargetLoader:
    return SoftTargetLoader(cache, inputs or tiny_transfer_set(), **{"batch_size": 7, **options})


def labels_of(loader) -> list[list[int]]:
    return [labels.tolist() for _, labels, _ in loader]


def joined_rightly(loader) -> bool:
    """Whether every row of soft targets is that of the input beside it."""
    return all(torch.allclose(soft_targets.logits()[:, 0], inputs) for inputs, _, soft_targets in loader)


# The join -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, INTEGER_IDS, STRING_IDS], ids=["positions", "integers", "strings"])
def test_every_input_meets_its_own_soft_targets(tmp_path, tier, ids):
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(example_ids=ids))
    assert joined_rightly(loader_of(cache, tiny_transfer_set(example_ids=ids), **tier))


def test_inputs_in_another_order_meet_their_own_soft_targets_by_id(tmp_path, tier):
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(example_ids=STRING_IDS))
    turned = TransferSet.from_arrays(tiny_inputs().flip(0), example_ids=STRING_IDS[::-1])
    assert joined_rightly(loader_of(cache, turned, **tier))


def test_a_part_of_the_inputs_meets_its_own_soft_targets(tmp_path, tier):
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(example_ids=STRING_IDS))
    part = TransferSet.from_arrays(tiny_inputs()[10:31], example_ids=STRING_IDS[10:31])
    assert joined_rightly(loader_of(cache, part, **tier))


def test_a_map_style_dataset_is_joined_by_position(cache, tier):
    dataset = list(zip(tiny_inputs(), tiny_labels(), strict=True))
    assert joined_rightly(SoftTargetLoader(cache, dataset, batch_size=7, **tier))


def test_labels_belong_to_the_inputs_beside_them(cache):
    by_input = {tuple(row.tolist()): label for row, label in zip(tiny_inputs(), tiny_labels(), strict=True)}
    for inputs, labels, _ in loader_of(cache):
        assert [by_input[tuple(row.tolist())] for row in inputs] == labels.tolist()


def test_inputs_without_labels_give_none(cache):
    assert {labels for _, labels, _ in loader_of(cache, TransferSet.from_arrays(tiny_inputs()))} == {None}


def test_both_tiers_give_the_same_batches(tmp_path):
    folder = tmp_path / "cache"
    build_tiny(folder, codec=Codes())
    resident = list(loader_of(open_cache(folder), shuffle=True, max_resident_bytes=2**20))
    streamed = list(loader_of(open_cache(folder), shuffle=True, max_resident_bytes=0))
    for one, other in zip(resident, streamed, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2].logits(), other[2].logits())


def test_some_teachers_alone_can_be_read(tmp_path):
    cache = build_tiny(tmp_path / "cache", teachers=tiny_teachers(3))
    assert {batch[2].teacher_names for batch in loader_of(cache, teachers=["c", "a"])} == {("c", "a")}


def test_views_are_joined_view_by_view(tmp_path, tier):
    views = Views(transform=lambda value, generator: value + float(generator.normal()), num_views=3, name="shift")
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(views=views))
    for view_index in range(3):
        assert joined_rightly(loader_of(cache, tiny_transfer_set(views=views), view_index=view_index, **tier))


# Sequences ------------------------------------------------------------------------------------------------------------

LENGTHS = [index % 4 + 1 for index in range(10)]


@pytest.fixture
def sequences():
    return tiny_inputs().reshape(10, 4, 4)


@pytest.fixture
def sequence_cache(tmp_path, sequences):
    transfer_set = TransferSet.from_arrays(sequences, num_rows=LENGTHS, example_ids=STRING_IDS[:10])
    return echo_cache(tmp_path / "cache", transfer_set, shard_rows=8)


def test_every_position_of_a_sequence_meets_its_own_soft_targets(sequence_cache, sequences, tier):
    transfer_set = TransferSet.from_arrays(sequences, num_rows=LENGTHS, example_ids=STRING_IDS[:10])
    for inputs, _, soft_targets in loader_of(sequence_cache, transfer_set, batch_size=3, **tier):
        rows = soft_targets.logits()[:, 0].split(soft_targets.num_rows.tolist())
        assert all(torch.allclose(row, sequence[: len(row)]) for row, sequence in zip(rows, inputs, strict=True))


def test_soft_targets_of_sequences_tell_the_rows_of_each_example(sequence_cache, sequences):
    transfer_set = TransferSet.from_arrays(sequences, num_rows=LENGTHS, example_ids=STRING_IDS[:10])
    loader = loader_of(sequence_cache, transfer_set, batch_size=4, shuffle=False)
    assert [soft_targets.num_rows.tolist() for _, _, soft_targets in loader] == [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2]]


@pytest.mark.parametrize("num_rows", [LENGTHS[::-1], [2, 1, *LENGTHS[2:]], None], ids=["turned", "same sum", "none"])
def test_other_row_counts_than_the_caches_are_refused_by_name(sequence_cache, sequences, num_rows):
    transfer_set = TransferSet.from_arrays(sequences, num_rows=num_rows, example_ids=STRING_IDS[:10])
    with pytest.raises(ShapeError, match=r"example 'image-\d+' has \d row\(s\) by the inputs and \d in cache"):
        loader_of(sequence_cache, transfer_set)


def test_row_counts_for_a_cache_without_positions_are_refused(cache):
    with pytest.raises(ShapeError, match=r"example 0 has 2 row\(s\) by the inputs and 1 in cache"):
        loader_of(cache, tiny_transfer_set(num_rows=[2] * 40))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_changed_inputs_are_refused_at_the_first_batch(cache):
    changed = tiny_inputs()
    changed += 0.01
    loader = loader_of(cache, TransferSet.from_arrays(changed))
    with pytest.raises(
        InputMismatchError, match=r"is not the input that the teachers of cache .* saw: its digest differs"
    ):
        next(iter(loader))


def test_one_changed_input_is_refused_in_the_epoch_that_begins_with_it(cache):
    first = int(epoch_order(40, seed=0, epoch=0)[2])
    changed = tiny_inputs()
    changed[first, 0] += 1
    with pytest.raises(InputMismatchError, match=rf"example {first} \(position {first} of the inputs\)"):
        next(iter(loader_of(cache, TransferSet.from_arrays(changed))))


def test_inputs_that_are_all_changed_behind_the_first_batch_are_refused_in_the_next(cache):
    order = epoch_order(40, seed=0, epoch=0)
    changed = tiny_inputs()
    changed[order[7:]] += 1
    batches = iter(loader_of(cache, TransferSet.from_arrays(changed)))
    with pytest.raises(InputMismatchError):
        list(batches)


def test_a_reordered_dataset_without_ids_is_refused(cache):
    turned = TransferSet.from_arrays(tiny_inputs().flip(0))
    with pytest.raises(InputMismatchError):
        next(iter(loader_of(cache, turned)))


def test_a_resumed_loader_checks_the_batch_it_goes_on_with(cache):
    at = int(epoch_order(40, seed=0, epoch=0)[7 * 4])
    changed = tiny_inputs()
    changed[at, 0] += 1
    loader = loader_of(cache, TransferSet.from_arrays(changed))
    loader.load_state_dict({**loader.state_dict(), "next_batch": 4})
    with pytest.raises(InputMismatchError, match=f"example {at} "):
        next(iter(loader))


def test_changed_inputs_pass_where_no_digests_were_kept(tmp_path):
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(digest_inputs=False))
    assert len(list(loader_of(cache, TransferSet.from_arrays(tiny_inputs() + 1)))) == 6


def test_ids_that_the_cache_does_not_have_are_refused_with_both_sizes(cache):
    more = TransferSet.from_arrays(tiny_inputs(41), labels=tiny_labels(41))
    with pytest.raises(UnknownExampleError, match=r"The inputs have 41 examples, the cache 40.* not in this cache: 40"):
        loader_of(cache, more)


def test_ids_of_another_type_are_refused(cache):
    with pytest.raises(UnknownExampleError, match=r"You gave string ids; convert them, such as \[int\(value\)"):
        loader_of(cache, tiny_transfer_set(example_ids=STRING_IDS))


VIEWS = Views(transform=lambda value, _: value, num_views=2, name="same-1", seed=4)
OTHER_VIEWS = [
    None,
    Views(transform=lambda value, _: value, num_views=2, name="same-2", seed=4),
    Views(transform=lambda value, _: value, num_views=2, name="same-1", seed=5),
]


@pytest.mark.parametrize("views", OTHER_VIEWS, ids=["no views", "another name", "another seed"])
def test_other_views_than_the_caches_are_refused_with_both_sides(tmp_path, views):
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(views=VIEWS))
    with pytest.raises(InputMismatchError, match=r"the teachers of cache .* saw views 'same-1' with seed 4"):
        loader_of(cache, tiny_transfer_set(views=views))


def test_views_for_a_cache_without_are_refused(cache):
    with pytest.raises(InputMismatchError, match=r"the inputs have views 'same-1' with seed 4, .* saw no views"):
        loader_of(cache, tiny_transfer_set(views=VIEWS))


def test_a_view_that_the_cache_does_not_have_is_refused(cache):
    with pytest.raises(ShapeError, match="there is no view 1"):
        loader_of(cache, view_index=1)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_needs_an_example(cache, batch_size):
    with pytest.raises(ShapeError, match=f"batch_size is {batch_size}; at least 1 is needed"):
        loader_of(cache, batch_size=batch_size)


def test_an_empty_choice_of_examples_is_refused(cache):
    with pytest.raises(TransferSetError, match="there are no examples to train on: example_ids is empty"):
        loader_of(cache, example_ids=[])


def test_a_chosen_example_that_the_inputs_do_not_have_is_refused(cache):
    with pytest.raises(UnknownExampleError, match="example_id 99 is not in this transfer set of 40 examples"):
        loader_of(cache, example_ids=[1, 99])


def test_an_unknown_teacher_is_refused(cache):
    with pytest.raises(UnknownTeacherError):
        loader_of(cache, teachers=["z"])


def test_a_damaged_shard_is_an_error_in_the_training_loop(tmp_path):
    cache = echo_cache(tmp_path / "cache")
    (tmp_path / "cache/teachers/echo/codes/c/1/0").unlink()
    with pytest.raises(CorruptCacheError, match="the shard is missing"):
        list(loader_of(cache, max_resident_bytes=0))


def test_a_cache_that_is_held_in_memory_can_be_sent_to_another_process(cache):
    list(loader_of(cache))
    assert joined_rightly(loader_of(pickle.loads(pickle.dumps(cache))))  # noqa: S301 - our own object


def test_a_loop_that_names_its_epochs_goes_on_within_one(cache):
    whole, restored = loader_of(cache), loader_of(cache)
    whole.set_epoch(2)
    batches = iter(whole)
    next(batches)
    restored.load_state_dict(whole.state_dict())
    restored.set_epoch(2)
    assert labels_of(restored) == [labels.tolist() for _, labels, _ in batches]


def test_a_state_behind_the_last_of_more_batches_goes_on_with_the_next_epoch(cache):
    whole, shorter = loader_of(cache), loader_of(cache, drop_last=True)
    for _ in itertools.islice(whole, 5):
        pass
    shorter.load_state_dict(whole.state_dict())
    assert len(labels_of(shorter)) == 5
    assert shorter.state_dict()["epoch"] == 2


def test_the_epoch_of_a_state_behind_a_last_batch_is_the_next_one(cache):
    loader = loader_of(cache)
    for _ in itertools.islice(loader, len(loader)):
        pass
    restored = loader_of(cache)
    restored.load_state_dict(loader.state_dict())
    assert (loader.epoch, restored.epoch) == (1, 1)


def test_a_state_of_another_shuffle_says_what_differs_and_what_it_follows_from(cache):
    windowed = loader_of(cache, shuffle="windowed", window_bytes=300)
    with pytest.raises(
        TransferSetError, match=r"'window_blocks': 0.*'window_blocks': 2.*follow from shuffle"
    ) as caught:
        windowed.load_state_dict(loader_of(cache).state_dict())
    assert "seed" not in str(caught.value)


def test_what_is_no_state_is_refused(cache):
    loader = loader_of(cache)
    state = loader.state_dict()
    del state["epoch"]
    for wrong in (state, {}, None):
        with pytest.raises(TransferSetError, match="no state of a loader: it has no epoch and next_batch"):
            loader.load_state_dict(wrong)


@pytest.mark.parametrize(("option", "value"), [("cache", "out/cache"), ("batch_size", "3"), ("batch_size", 2.0)])
def test_options_of_another_kind_are_refused(cache, option, value):
    options = {"cache": cache, "batch_size": 4} | {option: value}
    with pytest.raises(OptionError, match=f"{option} is {value!r}"):
        SoftTargetLoader(**options)


# Order ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_example_once(cache):
    seen = torch.cat([inputs for inputs, _, _ in loader_of(cache)])
    assert sorted(seen[:, 0].tolist()) == sorted(tiny_inputs()[:, 0].tolist())


def test_an_epoch_has_the_stated_order(cache):
    seen = torch.cat([inputs for inputs, _, _ in loader_of(cache, seed=5)])
    assert torch.equal(seen, tiny_inputs()[epoch_order(40, seed=5, epoch=0)])


def test_each_epoch_has_an_order_of_its_own(cache):
    loader = loader_of(cache, seed=5)
    epochs = [torch.cat([inputs for inputs, _, _ in loader]) for _ in range(3)]
    expected = [tiny_inputs()[epoch_order(40, seed=5, epoch=epoch)] for epoch in range(3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(epochs, expected, strict=True))


def test_an_epoch_can_be_chosen(cache):
    loader = loader_of(cache, seed=5)
    loader.set_epoch(9)
    seen = torch.cat([inputs for inputs, _, _ in loader])
    assert torch.equal(seen, tiny_inputs()[epoch_order(40, seed=5, epoch=9)])


def test_without_shuffling_examples_come_in_the_transfer_sets_order(cache):
    seen = torch.cat([inputs for inputs, _, _ in loader_of(cache, shuffle=False)])
    assert torch.equal(seen, tiny_inputs())


def test_some_examples_alone_can_be_trained_on(cache):
    seen = torch.cat([inputs for inputs, _, _ in loader_of(cache, example_ids=[9, 2, 30], shuffle=False)])
    assert torch.equal(seen, tiny_inputs()[[9, 2, 30]])


def test_chosen_examples_meet_their_own_soft_targets(cache, tier):
    assert joined_rightly(loader_of(cache, example_ids=np.arange(3, 39, 5), batch_size=3, **tier))


def test_the_last_batch_is_smaller(cache):
    assert [len(soft_targets) for _, _, soft_targets in loader_of(cache)] == [7, 7, 7, 7, 7, 5]


def test_a_smaller_last_batch_can_be_dropped(cache):
    assert [len(soft_targets) for _, _, soft_targets in loader_of(cache, drop_last=True)] == [7, 7, 7, 7, 7]


def test_a_full_last_batch_is_not_dropped(cache):
    assert [len(soft_targets) for _, _, soft_targets in loader_of(cache, batch_size=8, drop_last=True)] == [8] * 5


def test_a_batch_that_must_be_full_and_never_is_is_refused(cache):
    with pytest.raises(
        ShapeError, match=r"batch_size is 41 and there are 40 examples: drop_last=True .* leave drop_last"
    ):
        loader_of(cache, batch_size=41, drop_last=True)


@pytest.mark.parametrize(
    ("options", "length"), [({}, 6), ({"drop_last": True}, 5), ({"batch_size": 8}, 5), ({"batch_size": 99}, 1)]
)
def test_the_length_is_the_number_of_batches(cache, options, length):
    loader = loader_of(cache, **options)
    assert len(loader) == length == len(list(loader))


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(built):
    """Labels and inputs of two epochs, one batch after the other, and the state after each."""
    loader = loader_of(open_cache(built), seed=3)
    states, batches = [loader.state_dict()], []
    for _ in range(2):
        for inputs, _, _ in loader:
            batches.append(inputs)
            states.append(copy.deepcopy(loader.state_dict()))
    return states, batches


@pytest.mark.parametrize("step", range(13))
def test_a_loader_resumed_after_any_step_gives_the_undisturbed_rest(cache, undisturbed, step):
    states, batches = undisturbed
    loader = loader_of(cache, seed=3)
    loader.load_state_dict(states[step])
    rest = [inputs for _ in range(3) for inputs, _, _ in loader][: 12 - step]
    assert len(rest) == 12 - step
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, batches[step:], strict=True))


def test_a_resumed_loader_joins_rightly(cache, undisturbed):
    loader = loader_of(cache, seed=3)
    loader.load_state_dict(undisturbed[0][4])
    assert joined_rightly(loader)


def test_a_loop_that_was_left_loses_nothing_of_the_next(cache):
    loader = loader_of(cache, seed=3)
    next(iter(loader))
    whole = [inputs for inputs, _, _ in loader]
    assert torch.equal(torch.cat(whole), tiny_inputs()[epoch_order(40, seed=3, epoch=0)])


def test_the_state_of_a_loop_that_was_left_is_where_it_was_left(cache):
    loader = loader_of(cache, seed=3)
    first = next(iter(loader))[0]
    state = loader.state_dict()
    resumed = loader_of(cache, seed=3)
    resumed.load_state_dict(state)
    rest = [inputs for inputs, _, _ in resumed]
    assert torch.equal(torch.cat([first, *rest]), tiny_inputs()[epoch_order(40, seed=3, epoch=0)])


def test_two_loops_at_once_see_the_same_batches(cache):
    loader = loader_of(cache, seed=3)
    pairs = list(zip(loader, loader, strict=True))
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)


def test_choosing_an_epoch_forgets_a_loop_that_was_left(cache):
    loader = loader_of(cache, seed=3)
    next(iter(loader))
    loader.set_epoch(0)
    assert len(list(loader)) == 6


def test_a_state_can_be_written_as_json(cache):
    state = loader_of(cache).state_dict()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"batch_size": 8},
        {"example_ids": range(30)},
        {"example_ids": range(39, -1, -1)},
        {"shuffle": False},
        {"shuffle": "windowed"},
    ],
    ids=lambda other: f"{next(iter(other))} {next(iter(other.values()))}",
)
def test_a_state_of_a_loader_with_other_batches_is_refused(cache, other):
    state = loader_of(cache, seed=3).state_dict()
    with pytest.raises(
        TransferSetError, match=r"examples would be lost or repeated\. Make the loader with the same arguments"
    ):
        loader_of(cache, **{"seed": 3, **other}).load_state_dict(state)


# An example table in another order ------------------------------------------------------------------------------------


@pytest.fixture(params=[INTEGER_IDS, STRING_IDS], ids=["integers", "strings"])
def reordered(request, tmp_path):
    """A cache whose example table somebody sorted by id, checksums, label and digests included; and its ids."""
    ids = request.param
    echo_cache(tmp_path / "cache", tiny_transfer_set(example_ids=ids))
    file = tmp_path / "cache" / "examples.parquet"
    table = parquet.read_table(file).sort_by("example_id")
    assert table["example_id"].to_pylist() != ids
    assert sorted(table["first_row"].to_pylist()) == list(range(40))
    # As a tool would that lays the rows out afresh: each example's first row is again the sum of those before.
    table = table.set_column(
        table.schema.get_field_index("first_row"), table.schema.field("first_row"), pa.array(range(40), pa.int64())
    )
    parquet.write_table(table, file, write_page_checksum=True)
    return open_cache(tmp_path / "cache"), ids


def test_a_table_that_was_reordered_is_refused_whatever_order_inputs_have(reordered):
    cache, ids = reordered
    order = np.argsort(np.array(ids))
    sorted_inputs = TransferSet.from_arrays(tiny_inputs()[order], example_ids=[ids[place] for place in order])
    for inputs in (sorted_inputs, tiny_transfer_set(example_ids=ids), None):
        with pytest.raises(CorruptCacheError, match=r"examples\.parquet.*another one than complete\.json vouches for"):
            list(SoftTargetLoader(cache, inputs, batch_size=7))


def test_labels_that_were_altered_in_the_table_are_refused(tmp_path):
    echo_cache(tmp_path / "cache")
    file = tmp_path / "cache" / "examples.parquet"
    table = parquet.read_table(file)
    place = table.schema.get_field_index("label")
    labels = table["label"].to_pylist()
    table = table.set_column(place, table.schema.field("label"), pa.array(labels[1:] + labels[:1], pa.int64()))
    parquet.write_table(table, file, write_page_checksum=True)
    with pytest.raises(CorruptCacheError, match=r"another one than complete\.json vouches for"):
        SoftTargetLoader(open_cache(tmp_path / "cache"), batch_size=7)


@pytest.mark.parametrize("ids", [None, INTEGER_IDS, STRING_IDS], ids=["positions", "integers", "strings"])
def test_examples_in_row_order_are_told_by_content(tmp_path, ids):
    cache = echo_cache(tmp_path / "cache", tiny_transfer_set(example_ids=ids))
    own = list(range(40)) if ids is None else ids
    assert cache.are_all_in_row_order(own)
    assert cache.are_all_in_row_order(np.array(own, object if isinstance(own[0], str) else np.int64))
    for other in (own[:-1], [*own, own[0]], own[::-1], [own[1], own[0], *own[2:]], [str(key) for key in range(40)]):
        assert not cache.are_all_in_row_order(other)


def test_an_unfinished_cache_is_not_joined_by_comparing(tmp_path):
    echo_cache(tmp_path / "cache")
    (tmp_path / "cache" / "complete.json").unlink()
    assert not open_cache(tmp_path / "cache", allow_incomplete=True).are_all_in_row_order(range(40))


# Threads --------------------------------------------------------------------------------------------------------------


def test_two_loaders_of_one_cache_do_not_disturb_each_other(cache, tier):
    one, other = loader_of(cache, seed=1, **tier), loader_of(cache, seed=2, **tier)
    for (inputs, _, soft_targets), (more_inputs, _, more_soft_targets) in zip(one, other, strict=True):
        assert torch.allclose(soft_targets.logits()[:, 0], inputs)
        assert torch.allclose(more_soft_targets.logits()[:, 0], more_inputs)


def test_a_loop_that_is_left_leaves_no_thread(cache, tier):
    before = set(threading.enumerate())
    for _ in loader_of(cache, **tier):
        break
    cache.hold_in_memory()  # ends what the tier "memory" does behind the rows that were asked for
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def test_a_dataset_is_read_by_one_thread_also_when_an_epoch_is_left(cache, tier, monkeypatch):
    monkeypatch.setattr("kdcache.threads.SECONDS_TO_LEAVE", 0.001)
    dataset = OneAtATime()
    loader = loader_of(cache, dataset, **tier)
    for _ in range(4):
        for _ in loader:
            time.sleep(0.01)  # in which the next batch is begun
            break
    assert joined_rightly(loader)
    assert dataset.most_reading == 1


def test_an_unfinished_cache_is_streamed_with_a_mask(tmp_path):
    echo_cache(tmp_path / "cache")
    for name in ("complete.json", "commits/echo/1.json", "teachers/echo/codes/c/1/0"):
        (tmp_path / "cache" / name).unlink()
    cache = open_cache(tmp_path / "cache", allow_incomplete=True)
    masks = torch.cat([soft_targets.available for _, _, soft_targets in loader_of(cache, shuffle=False)])
    assert masks.tolist() == [True] * 16 + [False] * 16 + [True] * 8


def test_soft_targets_of_a_real_teacher_are_its_own(tmp_path):
    cache = build_tiny(tmp_path / "cache", teachers={"a": TinyTeacher()})
    inputs, _, soft_targets = next(iter(loader_of(cache)))
    expected = torch.softmax(TinyTeacher()(inputs) / 3, 1).detach()
    assert torch.allclose(soft_targets.probabilities(3.0), expected, atol=1e-5)


def test_other_labels_than_the_caches_are_refused(cache):
    labels = tiny_labels(40)
    labels[7] = (labels[7] + 1) % 4
    with pytest.raises(InputMismatchError, match=r"1 label\(s\) differ .* example 7 has \d+ here and \d+ there"):
        loader_of(cache, TransferSet.from_arrays(tiny_inputs(), labels=labels))


@pytest.mark.parametrize("shuffle", [0, 1, "yes", np.bool_(False)], ids=repr)
def test_what_is_no_way_to_shuffle_is_refused(cache, shuffle):
    with pytest.raises(OptionError, match="give True, False or 'windowed'"):
        loader_of(cache, shuffle=shuffle)


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


def test_named_tuples_of_inputs_are_moved_as_such(tmp_path):
    dataset = [Pair(row, -row) for row in tiny_inputs()]
    transfer_set = TransferSet(list(zip(dataset, tiny_labels(), strict=True)), digest_inputs=False)
    cache = build_tiny(tmp_path / "cache", tiny_transfer_set(digest_inputs=False), {"echo": Echo()})
    inputs, _, _ = next(iter(loader_of(cache, transfer_set, device="cpu")))
    assert isinstance(inputs, Pair)
