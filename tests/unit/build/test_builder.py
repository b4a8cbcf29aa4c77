from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest
import torch
from tiny_caches import (
    TinyTeacher,
    build_tiny,
    files_of,
    tiny_inputs,
    tiny_labels,
    tiny_teachers,
    tiny_transfer_set,
)
from torch import nn

import kdcache
from kdcache import Codes, Lossless, TopK, TransferSet, open_cache, verify_cache
from kdcache.build import BuildProgress, ModuleTeacher, SourcedTeacher
from kdcache.build.executors import InProcessExecutor
from kdcache.documents import Fingerprint, TeacherSource
from kdcache.errors import (
    CacheExistsError,
    DocumentError,
    DuplicateExampleError,
    JobError,
    OptionError,
    PlanMismatchError,
    TransferSetError,
    WrongClassCountError,
)
from kdcache.transfer_set import Views

ALL = range(40)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


def same_soft_targets(ours: torch.Tensor, theirs: torch.Tensor, *, atol: float = 1e-5) -> bool:
    return torch.allclose(centred(ours.float()), centred(theirs.float()), atol=atol)


@torch.no_grad()
def logits_of(*teachers: nn.Module) -> torch.Tensor:
    return torch.stack([teacher(tiny_inputs()) for teacher in teachers], dim=1)


# What is built --------------------------------------------------------------------------------------------------------


def test_a_cache_holds_each_teachers_logits_in_the_ensembles_order(folder):
    cache = build_tiny(folder, teachers={"b": TinyTeacher(1), "a": TinyTeacher(0)})
    assert cache.teacher_names == ("b", "a")
    assert same_soft_targets(cache.read(ALL).logits(), logits_of(TinyTeacher(1), TinyTeacher(0)))


def test_a_cache_holds_ids_labels_and_digests_in_row_order(folder):
    transfer_set = tiny_transfer_set(example_ids=[f"x{index}" for index in reversed(ALL)])
    cache = build_tiny(folder, transfer_set)
    assert cache.example_ids.tolist() == [f"x{index}" for index in reversed(ALL)]
    assert cache.labels.tolist() == tiny_labels()
    assert np.array_equal(cache.input_digests, transfer_set.input_digests)


@pytest.mark.parametrize("codec", [Codes(), Codes(dtype="uint16", spacing="uniform"), Lossless()], ids=str)
def test_every_codec_keeps_the_soft_targets(folder, codec):
    cache = build_tiny(folder, codec=codec)
    expected = torch.softmax(logits_of(*tiny_teachers().values()) / 2, -1)
    assert torch.allclose(torch.softmax(cache.read(ALL).logits() / 2, -1), expected, atol=0.02)


@pytest.mark.parametrize("tail", ["class-means", "samples"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_topk_keeps_the_largest_soft_targets(folder, tail, temperature):
    cache = build_tiny(folder, codec=TopK(k=2, tail=tail, num_samples=2))
    expected, kept = torch.softmax(logits_of(*tiny_teachers().values())[:, 1] / temperature, -1).topk(2, dim=1)
    found = cache.read(ALL).probabilities(temperature, teachers=["b"])
    assert torch.allclose(found.gather(1, kept), expected, atol=0.04)


@pytest.mark.parametrize("tail", ["class-means", "samples"])
def test_a_cache_of_topk_verifies(folder, tail):
    assert verify_cache(build_tiny(folder, codec=TopK(k=2, tail=tail)).address).is_sound


def test_a_merged_cache_of_samples_holds_the_geometric_mean(folder):
    cache = build_tiny(folder, codec=TopK(k=2, tail="samples", num_samples=2), merge="geometric")
    expected, kept = torch.softmax(logits_of(*tiny_teachers().values()).mean(1) / 2, -1).topk(2, dim=1)
    assert torch.allclose(cache.read(ALL).probabilities(2.0).gather(1, kept), expected, atol=0.04)


def test_teachers_may_be_given_as_objects(folder):
    class Doubling:
        fingerprint = Fingerprint.make(name="own", source="my:teacher", weights_sha256="0" * 64)

        @contextlib.contextmanager
        def running(self):
            yield lambda inputs: 2 * inputs

    cache = build_tiny(folder, teachers=[Doubling()])
    assert same_soft_targets(cache.read(ALL).logits()[:, 0], 2 * tiny_inputs())


def test_an_address_may_be_relative(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert build_tiny("cache").address == "cache"
    assert (folder / "complete.json").exists()


def test_progress_counts_every_row_of_every_teacher(folder):
    steps: list[BuildProgress] = []
    build_tiny(folder, on_progress=steps.append)
    done = [step.done_rows for step in steps if step.stage == "tasks"]
    assert (done[0], done[-1], sorted(done)) == (0, 80, done)


def test_progress_names_the_stages_in_order(folder):
    steps: list[BuildProgress] = []
    build_tiny(folder, on_progress=steps.append)
    assert list(dict.fromkeys((step.stage, step.teacher) for step in steps)) == [
        ("pilot", "a"), ("pilot", "b"), ("tasks", "a"), ("tasks", "b"), ("finalise", "b"),
    ]  # fmt: skip


# Going on -------------------------------------------------------------------------------------------------------------


def lose_shards(folder, *shards: str) -> None:
    (folder / "complete.json").unlink()
    for shard in shards:
        name, index = shard.split("/")
        (folder / f"commits/{shard}.json").unlink()
        (folder / f"teachers/{name}/codes/c/{index}/0").unlink()


def test_a_finished_cache_runs_no_teacher_again(folder):
    build_tiny(folder)
    teachers = tiny_teachers()
    build_tiny(folder, teachers=teachers)
    assert [teacher.num_calls for teacher in teachers.values()] == [0, 0]


def test_a_finished_cache_is_left_as_it_is(folder):
    build_tiny(folder)
    before = files_of(folder)
    build_tiny(folder)
    assert files_of(folder) == before


def test_only_what_is_missing_is_run_again(folder):
    build_tiny(folder)
    lose_shards(folder, "b/2")
    teachers = tiny_teachers()
    build_tiny(folder, teachers=teachers)
    assert [teacher.num_calls for teacher in teachers.values()] == [0, 2]


def test_a_resumed_build_ends_with_the_files_of_an_undisturbed_one(folder):
    build_tiny(folder)
    before = files_of(folder)
    lose_shards(folder, "a/1", "b/0", "b/2")
    build_tiny(folder)
    assert files_of(folder) == before


def test_progress_of_a_resumed_build_starts_at_what_is_published(folder):
    build_tiny(folder)
    lose_shards(folder, "a/1", "b/2")
    steps: list[BuildProgress] = []
    build_tiny(folder, on_progress=steps.append)
    assert [step.done_rows for step in steps] == [80 - 16 - 8, 80 - 8, 80, 80]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_resumed_build_runs_the_same_batches(folder, batch_size):
    class PerBatch(nn.Module):
        """Its logits tell the size and the sum of the batch they were computed in."""

        def forward(self, inputs):
            together = torch.tensor([float(len(inputs)), float(inputs.double().sum())])
            return torch.cat([inputs, together.expand(len(inputs), 2)], dim=1)

    build_tiny(folder, teachers={"a": PerBatch()}, batch_size=batch_size, num_pilot_rows=1)
    before = files_of(folder)
    lose_shards(folder, "a/1")
    build_tiny(folder, teachers={"a": PerBatch()}, batch_size=batch_size, num_pilot_rows=1)
    assert files_of(folder) == before


# Mismatches -----------------------------------------------------------------------------------------------------------

CHANGED_INPUTS = tiny_inputs()
CHANGED_INPUTS[3, 1] += 1
MISMATCHES = {
    "inputs": {"transfer_set": TransferSet.from_arrays(CHANGED_INPUTS, labels=tiny_labels())},
    "labels": {"transfer_set": tiny_transfer_set(labels=[0] * 40)},
    "order": {"transfer_set": TransferSet.from_arrays(tiny_inputs().flip(0), labels=tiny_labels())},
    "fewer examples": {"transfer_set": tiny_transfer_set(39)},
    "views": {"transfer_set": tiny_transfer_set(views=Views(transform=lambda x, _: x, num_views=2, name="same"))},
    "checkpoint": {"teachers": {"a": TinyTeacher(0), "b": TinyTeacher(7)}},
    "precision": {"autocast": "bfloat16"},
    "codec": {"codec": Codes()},
    "batch size": {"batch_size": 13},
    "classes": {"num_classes": 6},
    "merge": {"merge": "geometric"},
    "fewer teachers": {"teachers": {"a": TinyTeacher(0)}},
    "more teachers": {"teachers": {"a": TinyTeacher(0), "b": TinyTeacher(1), "c": TinyTeacher(2)}},
}


@pytest.fixture(params=MISMATCHES)
def mismatch(request):
    return MISMATCHES[request.param]


def test_another_plan_at_the_same_address_is_refused_with_both_sides(folder, mismatch):
    build_tiny(folder)
    with pytest.raises(PlanMismatchError, match=r": now .*, in the cache "):
        build_tiny(folder, **mismatch)


def test_another_plan_at_the_same_address_changes_nothing(folder, mismatch):
    build_tiny(folder)
    before = files_of(folder)
    with pytest.raises(PlanMismatchError):
        build_tiny(folder, **mismatch)
    assert files_of(folder) == before


def test_another_plan_is_refused_before_any_teacher_runs(folder):
    build_tiny(folder)
    teachers = {"a": TinyTeacher(0), "b": TinyTeacher(7)}
    with pytest.raises(PlanMismatchError):
        build_tiny(folder, teachers=teachers)
    assert [teacher.num_calls for teacher in teachers.values()] == [0, 0]


class LateExecutor(InProcessExecutor):
    """While its pilot runs, another builder finds the same empty folder and finishes another cache there."""

    def pilot(self, work, name):
        build_tiny(work.address, teachers={"a": TinyTeacher(1)})
        return super().pilot(work, name)


def test_another_builders_plan_that_came_first_is_respected(folder):
    with pytest.raises(PlanMismatchError, match=r"teachers\.a\.weights_sha256"):
        build_tiny(folder, teachers={"a": TinyTeacher(0)}, executor=LateExecutor())
    assert verify_cache(folder).is_sound


def test_a_folder_with_other_files_is_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("all of it")
    with pytest.raises(CacheExistsError, match="holds files that are no kdcache cache; nothing was written"):
        build_tiny(folder)
    assert files_of(folder) == {"thesis.tex": b"all of it"}


def test_a_file_in_the_place_of_a_cache_is_left_alone(folder):
    folder.write_text("all of it")
    with pytest.raises(CacheExistsError, match="is a file; a cache is a folder"):
        build_tiny(folder)
    assert folder.read_text() == "all of it"


def test_an_empty_folder_is_taken(folder):
    folder.mkdir()
    assert build_tiny(folder).complete is not None


# Bad arguments --------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "no teachers": ({"teachers": {}}, JobError, "no teachers were given; a cache needs at least one"),
    "no module": ({"teachers": {"a": "model.pt"}}, JobError, "a teacher is a str; give torch modules by name"),
    "no name": ({"teachers": [TinyTeacher()]}, JobError, "a teacher is a TinyTeacher; give torch modules by name"),
    "another name": (
        {"teachers": {"a": ModuleTeacher("b", TinyTeacher())}}, JobError, "given as 'a' calls itself 'b'",
    ),
    "a name that climbs": ({"teachers": {"../a": TinyTeacher()}}, DocumentError, r"letters, digits.*, got '\.\./a'"),
    "a name twice": (
        {"teachers": [ModuleTeacher("a", TinyTeacher()), ModuleTeacher("a", TinyTeacher(1))]},
        DocumentError, "teacher names stand more than once: a",
    ),
    "too few weights": ({"merge": "geometric", "weights": [1.0]}, JobError, r"weights \[1\.0\] do not fit 2 teachers"),
    "negative weights": ({"merge": "geometric", "weights": [2, -1]}, JobError, "do not fit 2 teachers"),
    "no weight at all": ({"merge": "geometric", "weights": [0, 0]}, JobError, "not all 0"),
    "weights that are not numbers": ({"merge": "geometric", "weights": [1, torch.nan]}, JobError, "do not fit"),
    "weights without merge": ({"weights": [1, 1]}, DocumentError, "weights are stored only in a merged cache"),
    "duplicate ids": (
        {"transfer_set": tiny_transfer_set(example_ids=[0, *range(39)])},
        DuplicateExampleError, "0 at positions 0 and 1",
    ),
    "rows that do not divide": ({"shard_rows": 10, "chunk_rows": 3}, DocumentError, "is no multiple of chunk_rows"),
    "a negative batch": ({"batch_size": -1}, OptionError, "batch_size is -1; expected a whole number of at least 1"),
    "an empty batch": ({"batch_size": 0}, OptionError, "batch_size is 0; expected"),
    "an empty pilot": ({"num_pilot_rows": 0}, OptionError, "num_pilot_rows is 0; expected"),
    "no classes": ({"num_classes": 0}, OptionError, "num_classes is 0; expected"),
    "empty shards": ({"shard_rows": 0, "chunk_rows": None}, OptionError, "shard_rows is 0; expected"),
    "empty chunks": ({"shard_rows": None, "chunk_rows": 0}, OptionError, "chunk_rows is 0; expected"),
    "half a batch": ({"batch_size": 1.5}, OptionError, "batch_size is 1.5; expected a whole number"),
    "processes below none": ({"num_workers": -1}, OptionError, "num_workers is -1; expected"),
    "a codec by name": ({"codec": "codes"}, OptionError, r"codec is 'codes'; give kdcache\.Codes"),
    "a codec table that is none": ({"codec": {"kind": "zip"}}, OptionError, "a mapping as in a job file .{'kind': 'c"),
    "a codec table of a wrong option": (
        {"codec": {"kind": "codes", "typ": 1}}, DocumentError, "typ: there is no such option .*dtype, spacing, max_kl",
    ),
    "one module": (
        {"teachers": nn.Sequential(nn.Linear(4, 5))}, JobError, r"one Sequential; .* teachers=\{'name': module\}",
    ),
    "another number of classes than the teacher's": (
        {"num_classes": 10}, WrongClassCountError, "gives 5 classes, and num_classes=10 was asked for",
    ),
    "a target below nothing": (
        {"codec": None, "max_kl": -0.1}, DocumentError, "max_kl: .*got -0.1.*\n.*max_kl=0.01, say.*Nothing was wr",
    ),
    "a target as text": ({"codec": None, "max_kl": "0.01"}, OptionError, "max_kl is '0.01'; expected a number"),
    "a budget that is a list": ({"codec": None, "bytes_per_row": [1]}, OptionError, "bytes_per_row is .1.; expected"),
    "no such device": ({"device": "gpu"}, OptionError, "'gpu' is no device of torch"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "said"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_say_what_is_wrong(folder, options, error, said):
    with pytest.raises(error, match=said):
        build_tiny(folder, **options)


@pytest.mark.parametrize("options", [options for options, _, _ in BAD_ARGUMENTS.values()], ids=BAD_ARGUMENTS)
def test_bad_arguments_write_nothing(folder, options):
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one the test above says
        build_tiny(folder, **options)
    assert not folder.exists()


def test_a_codec_may_be_given_as_the_table_of_a_job_file(folder):
    cache = build_tiny(folder, codec={"kind": "codes", "dtype": "uint16"})
    assert cache.teachers["a"].codec == Codes(dtype="uint16")


def test_a_target_may_be_a_number_of_numpy(folder):
    assert build_tiny(folder, codec=None, max_kl=np.float32(0.5)).num_examples == 40


def test_an_error_in_a_factory_is_not_hidden(folder, tmp_path, monkeypatch):
    (tmp_path / "broken_factory.py").write_text("def make():\n    return None.weight\n")
    monkeypatch.syspath_prepend(tmp_path)
    teacher = SourcedTeacher(TeacherSource.make(name="a", factory="broken_factory:make"), tmp_path)
    with pytest.raises(AttributeError, match="weight"):
        build_tiny(folder, teachers=[teacher])


def test_a_dataset_that_is_no_transfer_set_is_refused_with_the_way_to_wrap_it(folder):
    with pytest.raises(TransferSetError, match=r"the transfer set is a list; wrap it: kdcache\.TransferSet\(dataset"):
        build_tiny(folder, [torch.zeros(4)])
    assert not folder.exists()


# Options left out -----------------------------------------------------------------------------------------------------


def test_options_that_are_left_out_are_those_of_the_standing_cache(folder):
    built = build_tiny(folder, codec=Codes(dtype="uint16"), num_pilot_rows=20).complete
    again = kdcache.build_cache(folder, tiny_transfer_set(), tiny_teachers())
    assert again.complete == built


def test_a_teacher_is_added_with_the_options_of_the_standing_cache(folder):
    build_tiny(folder, codec=Codes(dtype="uint16"))
    cache = kdcache.build_cache(folder, tiny_transfer_set(), {"z": TinyTeacher(9)}, add_teachers=True)
    assert cache.teachers["z"].codec == Codes(dtype="uint16")


# Adding teachers ------------------------------------------------------------------------------------------------------


def test_an_added_teacher_stands_beside_the_others(folder):
    build_tiny(folder, teachers=tiny_teachers(2))
    cache = build_tiny(folder, teachers=tiny_teachers(3), add_teachers=True)
    assert same_soft_targets(cache.read(ALL).logits(), logits_of(*tiny_teachers(3).values()))


def test_a_teacher_may_be_added_without_the_others_at_hand(folder):
    build_tiny(folder, teachers=tiny_teachers(2))
    cache = build_tiny(folder, teachers={"z": TinyTeacher(9)}, add_teachers=True)
    assert cache.teacher_names == ("a", "b", "z")


def test_adding_a_teacher_runs_no_standing_one(folder):
    build_tiny(folder, teachers=tiny_teachers(2))
    teachers = tiny_teachers(3)
    build_tiny(folder, teachers=teachers, add_teachers=True)
    assert [teacher.num_calls > 0 for teacher in teachers.values()] == [False, False, True]


def test_adding_a_teacher_touches_no_standing_data(folder):
    build_tiny(folder, teachers=tiny_teachers(2))
    before = files_of(folder)
    build_tiny(folder, teachers=tiny_teachers(3), add_teachers=True)
    after = files_of(folder)
    assert {name for name in before if after[name] != before[name]} == {"complete.json", "zarr.json"}


def test_an_old_reader_goes_on_reading_while_and_after_a_teacher_is_added(folder):
    old = build_tiny(folder, teachers=tiny_teachers(2))
    read = []
    steps = lambda _: read.append(old.read(ALL).logits())  # noqa: E731
    build_tiny(folder, teachers=tiny_teachers(3), add_teachers=True, on_progress=steps)
    read.append(old.read(ALL).logits())
    assert len(read) > 4
    assert all(torch.equal(logits, read[0]) and logits.shape[1] == 2 for logits in read)


def test_adding_the_same_teacher_again_changes_nothing(folder):
    build_tiny(folder, teachers=tiny_teachers(2))
    build_tiny(folder, teachers=tiny_teachers(3), add_teachers=True)
    before = files_of(folder)
    build_tiny(folder, teachers=tiny_teachers(3), add_teachers=True)
    build_tiny(folder, teachers=tiny_teachers(3))
    assert files_of(folder) == before


def test_adding_teachers_to_nothing_builds_them(folder):
    assert build_tiny(folder, add_teachers=True).teacher_names == ("a", "b")


def test_teachers_can_be_added_one_after_the_other(folder):
    for count in (1, 2, 3):
        cache = build_tiny(folder, teachers=tiny_teachers(count), add_teachers=True)
    assert (cache.teacher_names, cache.complete.plan_index) == (("a", "b", "c"), 2)
    assert verify_cache(folder).is_sound


def test_a_teacher_with_other_classes_cannot_be_added(folder):
    build_tiny(folder, teachers=tiny_teachers(1))
    with pytest.raises(kdcache.errors.WrongClassCountError, match="teacher 'z' gives 7 classes, the cache has 5"):
        build_tiny(folder, teachers={"z": TinyTeacher(0, num_classes=7)}, add_teachers=True)
    assert open_cache(folder).teacher_names == ("a",)


# Merged caches --------------------------------------------------------------------------------------------------------


def test_a_merged_cache_gives_the_geometric_mean(folder, tmp_path):
    apart = build_tiny(tmp_path / "apart")
    merged = build_tiny(folder, merge="geometric")
    for temperature in (1.0, 4.0, 20.0):
        expected = apart.read(ALL).probabilities(temperature, mean="geometric")
        assert torch.allclose(merged.read(ALL).probabilities(temperature), expected, atol=1e-6)


def test_a_merged_cache_keeps_its_weights(folder, tmp_path):
    apart = build_tiny(tmp_path / "apart")
    merged = build_tiny(folder, merge="geometric", weights=[3, 1])
    expected = apart.read(ALL).probabilities(2.0, mean="geometric", weights=[3, 1])
    assert torch.allclose(merged.read(ALL).probabilities(2.0), expected, atol=1e-6)


def test_a_merged_cache_stores_one_array(folder):
    build_tiny(folder, merge="geometric")
    assert sorted(path.name for path in (folder / "teachers").iterdir() if path.is_dir()) == ["geometric-mean"]


def test_a_merged_cache_names_its_members(folder):
    cache = build_tiny(folder, merge="geometric", weights=[3, 1])
    document = cache.teachers["geometric-mean"]
    assert ([member.name for member in document.members], document.weights) == (["a", "b"], (0.75, 0.25))


def test_a_merged_cache_is_finished_after_a_stop(folder):
    build_tiny(folder, merge="geometric")
    before = files_of(folder)
    lose_shards(folder, "geometric-mean/1")
    build_tiny(folder, merge="geometric")
    assert files_of(folder) == before


# Sequences and views --------------------------------------------------------------------------------------------------

LENGTHS = [index % 4 + 1 for index in range(10)]


class Recogniser(nn.Module):
    """A sequence teacher: [example, position, class], padded to the longest it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = TinyTeacher(0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs)


@pytest.fixture
def sequences():
    return tiny_inputs(40).reshape(10, 4, 4)


@pytest.fixture
def sequence_cache(folder, sequences):
    transfer_set = TransferSet.from_arrays(sequences, num_rows=LENGTHS, example_ids=list("abcdefghij"))
    return build_tiny(folder, transfer_set, {"a": Recogniser()}, shard_rows=8, batch_size=3)


@torch.no_grad()
def rows_of(sequences, example):
    return Recogniser()(sequences[example])[: LENGTHS[example]]


def test_a_sequence_cache_has_a_row_for_each_position(sequence_cache):
    assert (sequence_cache.document.num_rows, sequence_cache.num_examples) == (sum(LENGTHS), 10)


def test_a_sequences_positions_are_read_one_after_the_other(sequence_cache, sequences):
    soft_targets = sequence_cache.read(["h", "c"])
    expected = torch.cat([rows_of(sequences, 7), rows_of(sequences, 2)])
    assert same_soft_targets(soft_targets.logits()[:, 0], expected)


def test_soft_targets_of_sequences_tell_the_rows_of_each_example(sequence_cache):
    assert sequence_cache.read(["h", "c", "a"]).num_rows.tolist() == [4, 3, 1]


def test_every_sequence_reads_its_own_rows(sequence_cache, sequences):
    expected = torch.cat([rows_of(sequences, example) for example in range(10)])
    assert same_soft_targets(sequence_cache.read(list("abcdefghij")).logits()[:, 0], expected)


def test_a_sequence_teacher_without_row_counts_is_refused(folder, sequences):
    with pytest.raises(kdcache.errors.WrongClassCountError, match="gives 4 positions an example"):
        build_tiny(folder, TransferSet.from_arrays(sequences), {"a": Recogniser()})


def test_a_sequence_teacher_with_too_few_positions_is_refused(folder, sequences):
    too_long = TransferSet.from_arrays(sequences, num_rows=[5] * 10)
    with pytest.raises(kdcache.errors.WrongClassCountError, match=r"4 positions an example, .* num_rows up to 5"):
        build_tiny(folder, too_long, {"a": Recogniser()})


def test_a_teacher_without_positions_is_refused_for_sequences(folder):
    with pytest.raises(kdcache.errors.WrongClassCountError, match="gives one row an example"):
        build_tiny(folder, tiny_transfer_set(num_rows=[2] * 40))


def shifted(value, generator):
    return value + float(generator.normal())


@pytest.fixture
def view_cache(folder):
    views = Views(transform=shifted, num_views=3, name="shift-1", seed=3)
    return build_tiny(folder, tiny_transfer_set(views=views))


@torch.no_grad()
def test_each_view_has_soft_targets_of_its_own_inputs(view_cache):
    transfer_set = tiny_transfer_set(views=Views(transform=shifted, num_views=3, name="shift-1", seed=3))
    for view_index in range(3):
        inputs = transfer_set.read_inputs(ALL, view_index=view_index)
        expected = torch.stack([teacher(inputs) for teacher in tiny_teachers().values()], 1)
        assert same_soft_targets(view_cache.read(ALL, view_index=view_index).logits(), expected)


def test_views_are_blocks_of_rows_one_after_the_other(view_cache):
    padded_rows = view_cache.document.padded_rows
    assert padded_rows == 48
    assert view_cache.rows_of([5, 39], view_index=2).tolist() == [2 * 48 + 5, 2 * 48 + 39]


def test_a_view_that_is_not_there_is_refused(view_cache):
    with pytest.raises(kdcache.errors.ShapeError, match=r"has 3 view\(s\); there is no view 3"):
        view_cache.read([0], view_index=3)


# Precision ------------------------------------------------------------------------------------------------------------


def test_a_teacher_run_in_bfloat16_is_kept_bit_for_bit(folder):
    cache = build_tiny(folder, teachers={"a": TinyTeacher()}, autocast="bfloat16", codec=Lossless(dtype="bfloat16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([TinyTeacher()(batch) for batch in tiny_inputs().split(12)])
    assert torch.equal(cache.read(ALL).logits()[:, 0], expected.float())


def test_a_teacher_in_float64_is_coded_as_it_is(folder):
    transfer_set = TransferSet.from_arrays(tiny_inputs().double())
    cache = build_tiny(folder, transfer_set, {"a": TinyTeacher().double()}, codec=Codes(dtype="uint16"))
    assert same_soft_targets(cache.read(ALL).logits()[:, 0], logits_of(TinyTeacher())[:, 0], atol=1e-3)


def test_a_lossless_cache_refuses_to_round(folder):
    with pytest.raises(kdcache.errors.CodecError, match=r"Use Lossless\(dtype=\"float32\"\)"):
        build_tiny(folder, codec=Lossless(dtype="bfloat16"))
    assert not folder.exists()


def test_files_taken_out_of_a_finished_cache_are_built_anew(folder):
    built = build_tiny(folder).complete
    (folder / "teachers/b/codes/c/1/0").unlink()
    (folder / "commits/b/1.json").unlink()
    assert build_tiny(folder).complete == built
    assert verify_cache(folder).is_sound


def test_an_index_taken_out_of_a_finished_cache_is_written_anew(folder):
    build_tiny(folder)
    shutil.rmtree(folder / "index")
    build_tiny(folder)
    assert verify_cache(folder).is_sound


def test_the_same_weights_in_other_layers_are_another_teacher(folder):
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    build_tiny(folder, teachers={"a": first})
    with pytest.raises(PlanMismatchError, match=r"teachers\.a\.settings_sha256"):
        build_tiny(folder, teachers={"a": torch.nn.Sequential(first[0], torch.nn.Tanh())})
