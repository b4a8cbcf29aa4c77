from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_caches import (
    NUM_EXAMPLES,
    OneAtATime,
    TinyTeacher,
    build_tiny,
    files_of,
    tiny_inputs,
    tiny_teachers,
    tiny_transfer_set,
)
from torch import nn

from kdcache import Codes, Lossless, TransferSet, open_cache
from kdcache.build.inference import BatchLogits, Inputs, shard_logits
from kdcache.build.plan import make_plan
from kdcache.build.rows import BatchKey, RowMap
from kdcache.documents import Fingerprint
from kdcache.errors import InputMismatchError, NonFiniteLogitsError, TeacherError, WrongClassCountError
from kdcache.transfer_set import Views, view_generator

FINGERPRINT = Fingerprint.make(name="a", source="m:n", weights_sha256="0" * 64)


class BatchDependent:
    """A stand-in for arithmetic that depends on what is computed together: logits hold the batch's size and sum."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        together = torch.tensor([float(len(inputs)), float(inputs.double().sum())])
        return torch.cat([inputs, together.expand(len(inputs), 2)], dim=1)


def logits_of(run, shards, *, batch_size=12, shard_rows=16, transfer_set=None, num_workers=0):
    transfer_set = transfer_set or tiny_transfer_set()
    plan = make_plan(
        transfer_set, [FINGERPRINT], codec=Codes(), num_classes=6, batch_size=batch_size, shard_rows=shard_rows
    )
    row_map = RowMap(plan, transfer_set.num_rows)
    batches = BatchLogits("a", run, Inputs(transfer_set, row_map, num_workers), num_classes=6)
    return dict(shard_logits(batches, row_map, shards))


def test_a_dataset_is_read_by_one_thread_also_when_a_teacher_failed(monkeypatch):
    monkeypatch.setattr("kdcache.threads.SECONDS_TO_LEAVE", 0.001)
    dataset, run, failed = OneAtATime(), BatchDependent(), []
    transfer_set = TransferSet(dataset)
    plan = make_plan(transfer_set, [FINGERPRINT], codec=Codes(), num_classes=6, batch_size=12, shard_rows=16)
    row_map = RowMap(plan, transfer_set.num_rows)

    def fail_at_first(inputs):
        if len(failed) < 4:
            raise ValueError
        return run(inputs)

    batches = BatchLogits("a", fail_at_first, Inputs(transfer_set, row_map), num_classes=6)
    for _ in range(4):
        with pytest.raises(TeacherError) as caught:
            dict(shard_logits(batches, row_map, [0, 1, 2]))
        failed.append(caught)  # whose traceback holds what the stream was at
    logits = dict(shard_logits(batches, row_map, [0, 1, 2]))
    assert torch.equal(torch.cat(list(logits.values()))[:, :4], tiny_inputs())
    assert dataset.most_reading == 1


# The grid -------------------------------------------------------------------------------------------------------------

BATCH_SIZES = [1, 7, 16, 32, 100]


@pytest.mark.parametrize("shards", [[0], [1], [2], [0, 2], [2, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_a_rows_logits_are_the_same_whatever_shards_are_asked_for(shards, batch_size):
    everything = logits_of(BatchDependent(), [0, 1, 2], batch_size=batch_size)
    some = logits_of(BatchDependent(), shards, batch_size=batch_size)
    assert all(torch.equal(logits, everything[shard]) for shard, logits in some.items())


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_a_shard_holds_its_own_rows_in_order(batch_size):
    logits = logits_of(BatchDependent(), [0, 1, 2], batch_size=batch_size)
    assert torch.equal(torch.cat(list(logits.values()))[:, :4], tiny_inputs())


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_the_last_shard_has_no_padding(batch_size):
    assert [len(logits) for logits in logits_of(BatchDependent(), [0, 1, 2], batch_size=batch_size).values()] == [
        16,
        16,
        8,
    ]


@pytest.mark.parametrize(("batch_size", "num_calls"), [(1, 40), (7, 6), (16, 3), (32, 2), (100, 1)])
def test_no_batch_is_run_twice(batch_size, num_calls):
    run = BatchDependent()
    logits_of(run, [0, 1, 2], batch_size=batch_size)
    assert run.num_calls == num_calls


@pytest.mark.parametrize(("shards", "num_calls"), [([0], 2), ([1], 2), ([2], 2), ([0, 2], 4)], ids=str)
def test_only_the_batches_of_the_shards_asked_for_are_run(shards, num_calls):
    run = BatchDependent()
    logits_of(run, shards, batch_size=12)
    assert run.num_calls == num_calls


def test_shards_come_in_ascending_order():
    assert list(logits_of(BatchDependent(), [2, 0, 1])) == [0, 1, 2]


def test_inputs_loaded_by_processes_give_the_same_logits():
    by_processes = logits_of(BatchDependent(), [1, 2], num_workers=1)
    assert torch.equal(by_processes[2], logits_of(BatchDependent(), [1, 2])[2])


def test_logits_that_are_known_already_are_not_computed_again():
    transfer_set = tiny_transfer_set()
    plan = make_plan(transfer_set, [FINGERPRINT], codec=Codes(), num_classes=6, batch_size=12)
    inputs = Inputs(transfer_set, RowMap(plan, transfer_set.num_rows))
    run = BatchDependent()
    known = torch.zeros(12, 6)
    batches = BatchLogits("a", run, inputs, num_classes=6, kept={BatchKey(0, 1): known})
    made = list(batches.stream([BatchKey(0, 0), BatchKey(0, 1), BatchKey(0, 2)]))
    assert (made[1] is known, run.num_calls) == (True, 2)


# Logits that cannot be cached -----------------------------------------------------------------------------------------


class Spoiled(nn.Module):
    """A teacher whose logits are spoiled for the example with a given first input."""

    def __init__(self, example_index: int, value: float, *, classes: slice = slice(3, 4)) -> None:
        super().__init__()
        self.linear = TinyTeacher(0)
        self.classes = classes
        self.marker = float(tiny_inputs()[example_index, 0])
        self.value = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = self.linear(inputs)
        logits[inputs[:, 0] == self.marker, self.classes] = self.value
        return logits


class Shaped(nn.Module):
    """A teacher that gives logits of another shape or type."""

    def __init__(self, change) -> None:
        super().__init__()
        self.linear = TinyTeacher(0)
        self.change = change

    def forward(self, inputs: torch.Tensor) -> object:
        return self.change(self.linear(inputs))


IDS = [f"image-{index}" for index in range(NUM_EXAMPLES)]


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "nan"), (torch.inf, "inf")])
def test_logits_that_are_not_finite_name_teacher_and_example(tmp_path, value, said):
    with pytest.raises(NonFiniteLogitsError) as caught:
        build_tiny(tmp_path / "cache", tiny_transfer_set(example_ids=IDS), {"best": Spoiled(29, value)})
    assert str(caught.value).startswith(
        f"teacher 'best' gave {said} among the logits of example 'image-29' (position 29, view 0). Such a row "
        "has no soft targets, so the shard was not written"
    )


def test_a_row_of_masked_classes_alone_names_teacher_and_example(tmp_path):
    teacher = Spoiled(29, -torch.inf, classes=slice(None))
    with pytest.raises(NonFiniteLogitsError, match=r"^teacher 'a' gave nothing but -inf as the logits of example 29 "):
        build_tiny(tmp_path / "cache", teachers={"a": teacher})


@pytest.mark.parametrize("codec", [Codes(), Codes(dtype="uint16"), Lossless()], ids=["uint8", "uint16", "lossless"])
@pytest.mark.parametrize("num_pilot_rows", [12, 40], ids=["after the pilot", "in the pilot"])
def test_a_masked_class_is_cached_as_such(tmp_path, codec, num_pilot_rows):
    teachers = {"a": Spoiled(29, -torch.inf)}
    cache = build_tiny(tmp_path / "cache", teachers=teachers, codec=codec, num_pilot_rows=num_pilot_rows)
    masked = cache.read(range(NUM_EXAMPLES)).logits()[:, 0].isneginf()
    assert masked.nonzero().tolist() == [[29, 3]]


def test_a_member_of_a_merged_cache_masks_for_all(tmp_path):
    teachers = {"a": TinyTeacher(1), "b": Spoiled(29, -torch.inf)}
    cache = build_tiny(tmp_path / "cache", teachers=teachers, merge="geometric")
    assert cache.read(range(NUM_EXAMPLES)).logits()[:, 0].isneginf().nonzero().tolist() == [[29, 3]]


def test_logits_of_the_pilot_that_are_not_finite_leave_nothing_behind(tmp_path):
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(tmp_path / "cache", teachers={"good": TinyTeacher(), "bad": Spoiled(29, torch.nan)})
    assert list(tmp_path.iterdir()) == []


def test_logits_after_the_pilot_that_are_not_finite_leave_whole_shards_alone(tmp_path):
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(tmp_path / "cache", teachers={"bad": Spoiled(29, torch.nan)}, num_pilot_rows=12)
    published = [name for name in files_of(tmp_path) if "/codes/c/" in name or "/commits/" in name]
    assert sorted(published) == ["cache/commits/bad/0.json", "cache/teachers/bad/codes/c/0/0"]


def test_a_mended_input_lets_the_same_call_finish(tmp_path):
    teacher = Spoiled(29, torch.nan)
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(tmp_path / "cache", teachers={"a": teacher}, num_pilot_rows=12)
    teacher.value = 1.0
    assert build_tiny(tmp_path / "cache", teachers={"a": teacher}, num_pilot_rows=12).complete is not None


BAD_SHAPES = [
    (lambda logits: logits[:-1], r"logits of shape \(11, 5\) and dtype torch\.float32 for 12 examples"),
    (lambda logits: logits[0], r"logits of shape \(5,\)"),
    (lambda logits: logits[:, None, None], r"logits of shape \(12, 1, 1, 5\)"),
    (lambda logits: logits.long(), r"dtype torch\.int64 for 12 examples; expected floating-point"),
    (
        lambda logits: logits[:, None].expand(-1, 3, -1),
        r"gives 3 positions an example.*num_rows up to 1\. Give the pos",
    ),
    (
        lambda logits: logits.tolist(),
        "a teacher gave a list; a tensor of logits, or an object or mapping with `logits`",
    ),
]


@pytest.mark.parametrize(("change", "said"), BAD_SHAPES, ids=["rows", "axis", "axes", "integers", "positions", "list"])
def test_logits_of_a_wrong_shape_say_what_was_expected(tmp_path, change, said):
    with pytest.raises(WrongClassCountError, match=said):
        build_tiny(tmp_path / "cache", teachers={"a": Shaped(change)}, num_classes=5)


@pytest.mark.parametrize("change", [change for change, _ in BAD_SHAPES], ids=range(len(BAD_SHAPES)))
def test_logits_of_a_wrong_shape_leave_nothing_behind(tmp_path, change):
    with pytest.raises(WrongClassCountError):
        build_tiny(tmp_path / "cache", teachers={"a": TinyTeacher(), "b": Shaped(change)})
    assert list(tmp_path.iterdir()) == []


def test_members_over_other_classes_are_refused_by_name(tmp_path):
    with pytest.raises(WrongClassCountError, match="teacher 'b' gives 7 classes, the cache has 5"):
        build_tiny(tmp_path / "cache", teachers={"a": TinyTeacher(), "b": TinyTeacher(num_classes=7)})


def test_members_over_other_classes_leave_nothing_behind(tmp_path):
    with pytest.raises(WrongClassCountError):
        build_tiny(tmp_path / "cache", teachers={"a": TinyTeacher(), "b": TinyTeacher(num_classes=7)})
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_cannot_be_added_leaves_the_cache_as_it_was(tmp_path):
    build_tiny(tmp_path / "cache", teachers=tiny_teachers(1))
    before = files_of(tmp_path)
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(tmp_path / "cache", teachers={**tiny_teachers(1), "bad": Spoiled(3, torch.nan)}, add_teachers=True)
    assert files_of(tmp_path) == before


class Failing(nn.Module):
    """A teacher that fails on the example with a given first input."""

    def __init__(self, example_index: int) -> None:
        super().__init__()
        self.linear = TinyTeacher(0)
        self.marker = float(tiny_inputs()[example_index, 0])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs[:, 0] == self.marker).any()):
            raise ZeroDivisionError("by hand")
        return self.linear(inputs)


@pytest.mark.parametrize(
    ("ids", "said"), [(None, "24 to 35"), (IDS, "'image-24' to 'image-35'")], ids=["positions", "names"]
)
def test_a_teacher_that_fails_is_named_with_its_batch(tmp_path, ids, said):
    with pytest.raises(TeacherError) as caught:
        build_tiny(tmp_path / "cache", tiny_transfer_set(example_ids=ids), {"a": Failing(29)})
    assert f"teacher 'a' failed on the batch of 12 examples from {said}: ZeroDivisionError: by hand" in str(
        caught.value
    )


def test_a_teachers_own_error_is_the_cause(tmp_path):
    with pytest.raises(TeacherError) as caught:
        build_tiny(tmp_path / "cache", teachers={"a": Failing(29)})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# Inputs ---------------------------------------------------------------------------------------------------------------


class Restless:
    """A dataset that gives another input each time it is asked."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        return self.generator.normal(size=4).astype(np.float32), index % 5


def test_a_dataset_that_augments_at_random_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(InputMismatchError, match=r"put random\s+augmentation into Views\(transform=") as caught:
        build_tiny(tmp_path / "cache", TransferSet(Restless()))
    assert "gives another input than when the transfer set was read first" in str(caught.value)


def test_a_dataset_that_augments_at_random_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputMismatchError):
        build_tiny(tmp_path / "cache", TransferSet(Restless()))
    assert list(tmp_path.iterdir()) == []


class Unreadable:
    """A dataset that cannot give one of its examples."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        if index == 13:
            raise OSError("disc gone")
        return torch.zeros(4), index % 5


def test_a_datasets_own_error_passes_through(tmp_path):
    with pytest.raises(OSError, match="disc gone") as caught:
        build_tiny(tmp_path / "cache", TransferSet(Unreadable(), digest_inputs=False, labels=[0] * 20))
    assert "for example 13 (position 13) of the transfer set. What is published is kept" in caught.value.__notes__[0]


def test_an_example_that_cannot_be_digested_is_named(tmp_path):
    with pytest.raises(OSError, match="disc gone") as caught:
        build_tiny(tmp_path / "cache", TransferSet(Unreadable()))
    assert "for example 13 (position 13) of the transfer set" in caught.value.__notes__[0]


def test_logits_that_are_not_finite_name_the_view(tmp_path):
    spoiled = view_generator(0, 30, 1).random()
    views = Views(
        transform=lambda value, generator: value * torch.nan if generator.random() == spoiled else value,
        num_views=2,
        name="spoil",
    )
    with pytest.raises(NonFiniteLogitsError, match=r"the logits of example 30 \(position 30, view 1\)"):
        build_tiny(tmp_path / "cache", tiny_transfer_set(views=views))


def test_what_was_published_before_an_error_is_opened_as_incomplete(tmp_path):
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(tmp_path / "cache", teachers={"bad": Spoiled(29, torch.nan)}, num_pilot_rows=12)
    cache = open_cache(tmp_path / "cache", allow_incomplete=True)
    assert cache.read([3, 20]).available.tolist() == [True, False]
