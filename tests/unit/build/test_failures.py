from __future__ import annotations

import errno

import pytest
import torch
from tiny_caches import TinyTeacher, build_tiny, files_of, tiny_inputs
from torch import nn

from kdcache import TransferSet, open_cache
from kdcache.build.failures import MAX_FAILURES_IN_A_ROW, FailedShard, Failures
from kdcache.errors import CodecError, NonFiniteLogitsError, StoreError, TeacherError, WrongClassCountError

OPTIONS = {"num_classes": 5, "num_pilot_rows": 1, "batch_size": 4, "shard_rows": 4, "chunk_rows": 4}


class Faulty(nn.Module):
    """A teacher that does something else with some examples, and counts its batches."""

    def __init__(self, examples, fault):
        super().__init__()
        self.linear = TinyTeacher(0)
        self.markers = tiny_inputs()[list(examples), 0]
        self.fault = fault
        self.num_calls = 0

    def forward(self, inputs):
        self.num_calls += 1
        logits = self.linear(inputs).half().float()
        bad = torch.isin(inputs[:, 0], self.markers)
        return self.fault(logits, bad) if bad.any() else logits


def with_nan(logits, bad):
    return logits.masked_fill(bad[:, None], torch.nan)


def with_another_class(logits, bad):  # noqa: ARG001 - a fault
    return torch.cat([logits, logits[:, :1]], dim=1)


def crash(logits, bad):  # noqa: ARG001 - a fault
    raise RuntimeError("boom")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def published(folder):
    return {int(path.stem) for path in (folder / "commits/a").iterdir()}


def build_with(folder, examples, fault, **options):
    teacher = Faulty(examples, fault)
    build_tiny(folder, TransferSet.from_arrays(tiny_inputs()), {"a": teacher}, **OPTIONS, **options)


def test_a_bad_example_keeps_no_other_shard_from_being_built(folder):
    with pytest.raises(NonFiniteLogitsError):
        build_with(folder, [14], with_nan)
    assert published(folder) == set(range(10)) - {3}


def test_a_bad_example_is_named_with_the_number_of_shards_that_failed(folder):
    with pytest.raises(NonFiniteLogitsError, match=r"example 14 .*1 of 10 shard\(s\) failed \(a/3\); the others are"):
        build_with(folder, [14], with_nan)


def test_of_several_bad_examples_the_first_is_raised_and_all_shards_are_named(folder):
    with pytest.raises(TeacherError, match=r"from 12 to 15: RuntimeError: boom.* 3 of 10 .* \(a/3, a/5, a/9\)"):
        build_with(folder, [14, 20, 39], crash)


def test_a_bad_example_of_one_teacher_does_not_stop_the_next(folder):
    with pytest.raises(NonFiniteLogitsError, match=r"1 of 20 shard\(s\) failed \(a/3\)"):
        build_tiny(folder, teachers={"a": Faulty([14], with_nan), "b": TinyTeacher(1)}, **OPTIONS)
    assert len(list((folder / "commits/b").iterdir())) == 10


def test_batches_are_not_run_again_for_a_bad_one(folder):
    teacher = Faulty([14], with_nan)
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(folder, TransferSet.from_arrays(tiny_inputs()), {"a": teacher}, **OPTIONS)
    assert teacher.num_calls == 10


def test_an_error_while_a_shard_is_encoded_keeps_no_other_from_being_built(folder):
    def beyond_float16(logits, bad):
        return torch.where(bad[:, None], 1.0001 * logits, logits)

    with pytest.raises(CodecError, match=r"shard 3 of teacher 'a' cannot be encoded.*1 of 10 shard\(s\) failed"):
        build_with(folder, [14], beyond_float16, codec={"kind": "lossless", "dtype": "float16"})
    assert published(folder) == set(range(10)) - {3}


def test_a_wrong_class_count_stops_the_build_at_once(folder):
    with pytest.raises(WrongClassCountError):
        build_with(folder, [14], with_another_class)
    assert max(published(folder)) < 3


def test_a_build_in_which_nothing_succeeds_stops(folder):
    with pytest.raises(
        TeacherError, match=r"The build stopped: 8 shards in a row failed \(a/1, a/2, a/3, a/4, a/5, \.\.\.\)"
    ):
        build_with(folder, range(4, 40), crash)
    assert published(folder) == {0}


def test_a_build_goes_on_once_the_example_is_mended(folder):
    teacher = Faulty([14], with_nan)
    with pytest.raises(NonFiniteLogitsError):
        build_tiny(folder, TransferSet.from_arrays(tiny_inputs()), {"a": teacher}, **OPTIONS)
    teacher.markers = torch.tensor([])
    teacher.num_calls = 0
    build_tiny(folder, TransferSet.from_arrays(tiny_inputs()), {"a": teacher}, **OPTIONS)
    assert open_cache(folder).complete is not None
    assert teacher.num_calls == 1
    assert "complete.json" in files_of(folder)


# Counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "no space left"), StoreError("none"), WrongClassCountError("7 classes")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_every_shard_would_meet_is_raised_at_once(error):
    with pytest.raises(type(error)) as caught:
        Failures(100).add(FailedShard("a", 0, error))
    assert caught.value is error


def test_a_success_between_them_starts_the_count_of_failures_anew():
    failures = Failures(100)
    for shard in range(MAX_FAILURES_IN_A_ROW - 1):
        failures.add(FailedShard("a", shard, TeacherError("bad")))
    failures.note_success()
    failures.add(FailedShard("a", 50, TeacherError("bad")))
    assert failures.in_words() == "8 of 100 shard(s) failed (a/0, a/1, a/2, a/3, a/4, ...)"


def test_an_error_that_is_not_ours_is_raised_as_it_is_with_a_note():
    failures = Failures(100)
    failures.add(FailedShard("a", 3, KeyError("gone")))
    with pytest.raises(KeyError) as caught:
        failures.raise_first()
    assert caught.value.__notes__ == ["1 of 100 shard(s) failed (a/3); the others are published"]


def test_without_failures_nothing_is_raised():
    Failures(3).raise_first()
