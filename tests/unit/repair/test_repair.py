"""Whatever is damaged: a repair drops what is bad, brings back what it can, and says what is left."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from damage import FILES, change, cut, flip, lose, place, swap
from tiny_caches import Stop, TinyTeacher, build_tiny, files_of, tiny_teachers, tiny_transfer_set

import kdcache
from kdcache import Codes, open_cache, repair_cache, verify_cache
from kdcache.documents import Record
from kdcache.errors import (
    CacheNotFoundError,
    CorruptCacheError,
    IncompleteCacheError,
    OptionError,
    PlanMismatchError,
)
from kdcache.store import LocalObjects
from kdcache.verify import shards as verifying

CODES = Codes(spacing="uniform")
SHARD, RECORD = "teachers/a/codes/c/1/0", "commits/a/1.json"
NEED_TEACHER = ["teachers/a/codes/c/1/0", "teachers/b/codes/c/2/0", "commits/a/0.json", "commits/b/2.json"]
PARAMETERS = ["teachers/a/PARAMETERS/codebook/c/0", "teachers/a/PARAMETERS/coefficients/c/0"]
DAMAGE = [flip, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (lose, cut))]
DERIVED = [name for name in FILES if name not in (*NEED_TEACHER, *PARAMETERS, "examples.parquet")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache to which a second teacher was added."""
    folder = tmp_path_factory.mktemp("repair") / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


def repair(folder, **options):
    """Repair with the transfer set and the teachers."""
    return repair_cache(folder, tiny_transfer_set(), tiny_teachers(2), **options)


def done(report):
    return [(action.verb, action.key) for action in report.actions]


# With the teachers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_any_damaged_file_comes_back_as_it_was(folder, built, name, damage):
    damage(place(folder, name))
    report = repair(folder)
    assert (report.command, report.hopeless, report.findings) == (None, (), ())
    assert files_of(folder) == files_of(built)


def test_damage_to_many_files_at_once_is_mended(folder, built):
    for name in ("complete.json", "teachers/a/codes/c/0/0", "commits/b/1.json", "examples.parquet", "index/zarr.json"):
        place(folder, name).write_bytes(b"torn")
    repair(folder)
    assert files_of(folder) == files_of(built)


@pytest.mark.parametrize("others", ["teachers/a/codes/c/1/0", "teachers/b/codes/c/0/0"])
def test_swapped_shards_are_both_built_anew(folder, built, others):
    swap(folder, "teachers/a/codes/c/0/0", others)
    repair(folder)
    assert files_of(folder) == files_of(built)


@pytest.mark.parametrize("lost", [["index"], ["index/fences"], ["index", "commits/a/1.json", "teachers/b/codes/c/0/0"]])
def test_an_index_that_is_lost_with_complete_json_is_made_from_the_transfer_set(folder, built, lost):
    for name in ("complete.json", *lost):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    repair(folder)
    assert files_of(folder) == files_of(built)


def test_an_index_that_is_lost_with_complete_json_is_left_to_the_build_where_no_transfer_set_is(folder, built):
    (folder / "complete.json").unlink()
    shutil.rmtree(folder / "index")
    report = repair_cache(folder)
    assert (report.is_complete, report.command) == (False, "kdcache build JOB")
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES)
    assert files_of(folder) == files_of(built)


def test_other_teachers_are_refused_before_anything_is_taken_away(folder):
    lose(folder / SHARD)
    flip(folder / "teachers/b/codes/c/0/0")
    before = files_of(folder)
    others = {"a": TinyTeacher(seed=99), "b": tiny_teachers(2)["b"]}
    with pytest.raises(PlanMismatchError, match=r"(?s)planned otherwise.*Nothing was changed"):
        repair_cache(folder, tiny_transfer_set(), others)
    assert files_of(folder) == before


def test_only_the_dropped_shard_is_computed_again(folder):
    lose(folder / SHARD)
    teachers = tiny_teachers(2)
    before = teachers["b"].num_calls
    repair_cache(folder, tiny_transfer_set(), teachers)
    assert (teachers["a"].num_calls, teachers["b"].num_calls - before) == (2, 0)


def test_an_untouched_shard_is_the_very_file_that_it_was(folder):
    inode = (folder / "teachers/a/codes/c/0/0").stat().st_ino
    cut(folder / SHARD)
    repair(folder)
    assert (folder / "teachers/a/codes/c/0/0").stat().st_ino == inode


def test_a_sound_cache_is_left_as_it_is(folder, built):
    report = repair(folder)
    assert (report.actions, report.is_complete, report.command) == ((), True, None)
    assert files_of(folder) == files_of(built)


def test_a_second_repair_finds_nothing_to_do(folder):
    cut(folder / SHARD)
    repair(folder)
    assert repair(folder).actions == ()


def test_an_unfinished_cache_is_finished(folder, built):
    for name in ("complete.json", RECORD, "teachers/b/codes/c/2/0", "commits/b/2.json"):
        lose(folder / name)
    assert repair(folder).is_complete
    assert files_of(folder) == files_of(built)


def test_a_certificate_altered_in_a_record_is_measured_again(folder, built):
    certificate = json.loads((folder / RECORD).read_text())["certificate"]
    change(folder / RECORD, certificate={**certificate, "max_error_range": 0.5})
    repair(folder)
    assert files_of(folder) == files_of(built)


def test_a_teacher_whose_arithmetic_does_not_repeat_gets_a_new_record_and_certificate(folder):
    class Rounding(TinyTeacher):
        def forward(self, inputs):
            return super().forward(inputs) + 1e-3 * torch.sin(1000 * inputs.sum(1, keepdim=True) + torch.arange(5))

    before = open_cache(folder).complete
    cut(folder / SHARD)
    standing = {"a": TinyTeacher(0), "b": TinyTeacher(1)}
    rounding = {"a": Rounding(0), "b": standing["b"]}
    fingerprints = kdcache.build.ModuleTeacher("a", standing["a"]).fingerprint
    teacher = kdcache.build.ModuleTeacher("a", rounding["a"])
    teacher.__dict__["fingerprint"] = fingerprints  # the same network on other hardware
    repair_cache(folder, tiny_transfer_set(), [teacher, kdcache.build.ModuleTeacher("b", standing["b"])])
    after = open_cache(folder).complete
    assert after.data_digest != before.data_digest
    assert verify_cache(folder, level="deep").is_sound


def test_a_shard_of_a_teacher_that_is_being_added_is_mended_and_readers_see_nothing(folder):
    before = (folder / "complete.json").read_bytes()
    build_tiny(folder, teachers=tiny_teachers(3), codec=CODES, add_teachers=True)
    (folder / "complete.json").write_bytes(before)
    cut(folder / "teachers/c/codes/c/1/0")
    report = repair_cache(folder)
    assert done(report) == [("drop", "commits/c/1.json"), ("drop", "teachers/c/codes/c/1/0")]
    assert open_cache(folder).teacher_names == ("a", "b")


def test_another_transfer_set_is_refused_before_anything_is_changed(folder):
    lose(folder / "examples.parquet")
    before = files_of(folder)
    with pytest.raises(PlanMismatchError, match=r"(?s)The transfer set is another one: .* Nothing was changed"):
        repair_cache(folder, tiny_transfer_set(39), tiny_teachers(2))
    assert files_of(folder) == before


def test_parameters_that_another_fit_would_replace_are_never_written(folder):
    lose(place(folder, PARAMETERS[0]))
    other = tiny_teachers(2)
    other["a"] = TinyTeacher(5)
    teacher = kdcache.build.ModuleTeacher("a", other["a"])
    teacher.__dict__["fingerprint"] = kdcache.build.ModuleTeacher("a", TinyTeacher(0)).fingerprint
    before = files_of(folder)
    report = repair_cache(folder, tiny_transfer_set(), [teacher, kdcache.build.ModuleTeacher("b", other["b"])])
    (action,) = report.hopeless
    assert "the fit gave other parameters" in action.why
    assert "delete complete.json, commits/a and teachers/a and run `kdcache build JOB`" in action.then
    assert files_of(folder) == before


# Without the teachers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", DERIVED)
def test_what_follows_from_other_files_needs_no_teacher(folder, built, name, damage):
    damage(place(folder, name))
    report = repair_cache(folder)
    assert (report.command, report.findings) == (None, ())
    assert files_of(folder) == files_of(built)


@pytest.mark.parametrize("name", NEED_TEACHER)
def test_what_needs_the_teacher_is_dropped_and_named_with_the_command(folder, name):
    cut(folder / name)
    report = repair_cache(folder)
    assert (report.command, report.num_missing_shards, report.is_complete) == ("kdcache build JOB", 1, False)
    with pytest.raises(IncompleteCacheError):
        open_cache(folder)


@pytest.mark.parametrize("name", NEED_TEACHER)
def test_the_build_goes_on_from_what_a_repair_leaves(folder, built, name):
    flip(folder / name)
    repair_cache(folder)
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES)
    assert files_of(folder) == files_of(built)


def test_complete_json_goes_first_then_the_record_then_the_shard(folder):
    flip(folder / SHARD)
    assert done(repair_cache(folder)) == [("drop", "complete.json"), ("drop", RECORD), ("drop", SHARD)]


def test_a_bad_record_is_dropped_and_its_shard_kept(folder):
    standing = (folder / SHARD).read_bytes()
    cut(folder / RECORD)
    repair_cache(folder)
    assert (folder / SHARD).read_bytes() == standing
    assert not (folder / RECORD).exists()


def test_a_record_written_in_another_way_is_written_as_it_was(folder, built):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record))
    assert done(repair_cache(folder)) == [("write", RECORD)]
    assert files_of(folder) == files_of(built)


def test_a_torn_shard_without_a_record_is_dropped(folder):
    for name in ("complete.json", RECORD):
        lose(folder / name)
    cut(folder / SHARD)
    assert done(repair_cache(folder)) == [("drop", SHARD)]


def test_a_whole_shard_without_a_record_is_kept_in_an_unfinished_cache(folder):
    for name in ("complete.json", RECORD):
        lose(folder / name)
    report = repair_cache(folder)
    assert (report.actions, report.command) == ((), "kdcache build JOB")
    assert (folder / SHARD).exists()


def test_files_beyond_the_layout_are_dropped_and_the_cache_stays_complete(folder, built):
    shutil.copytree(folder / "teachers/a/codes/c/2", folder / "teachers/a/codes/c/3")
    shutil.copy(folder / "commits/a/2.json", folder / "commits/a/3.json")
    report = repair_cache(folder)
    assert (report.is_complete, report.command) == (True, None)
    assert files_of(folder) == files_of(built)


def test_where_a_later_teacher_lost_a_shard_the_earlier_ones_are_not_made_a_cache_by_themselves(folder):
    flip(folder / "teachers/b/codes/c/0/0")
    repair_cache(folder)
    repair_cache(folder)
    assert not (folder / "complete.json").exists()


def test_a_completion_is_written_anew_while_a_teacher_is_being_added(folder):
    before = (folder / "complete.json").read_bytes()
    build_tiny(folder, teachers=tiny_teachers(3), codec=CODES, add_teachers=True)
    (folder / "complete.json").write_bytes(before.replace(b'"data_digest"', b'"data_digest" ', 1))
    lose(folder / "commits/c/0.json")
    assert done(repair_cache(folder)) == [("write", "complete.json")]
    assert (folder / "complete.json").read_bytes() == before


def stop_at_its_second_shard(step):
    if step.stage == "tasks" and step.done_rows >= 2 * 40 + 32:
        raise Stop


@pytest.mark.parametrize("damage", [lose, flip, cut])
def test_the_ensemble_is_brought_back_while_a_teacher_is_being_added(folder, damage):
    before = (folder / "complete.json").read_bytes()
    with pytest.raises(Stop):
        build_tiny(
            folder, teachers=tiny_teachers(3), codec=CODES, add_teachers=True, on_progress=stop_at_its_second_shard
        )
    (folder / "commits/c/2.json").unlink(missing_ok=True)  # a thread may have been at it
    assert {path.name for path in (folder / "commits/c").iterdir()} == {"0.json", "1.json"}
    damage(folder / "complete.json")
    report = repair_cache(folder)
    assert report.is_complete
    assert (folder / "complete.json").read_bytes() == before
    assert open_cache(folder).teacher_names == ("a", "b")
    build_tiny(folder, teachers=tiny_teachers(3), codec=CODES, add_teachers=True)
    assert open_cache(folder).teacher_names == ("a", "b", "c")


def test_the_ensemble_is_brought_back_with_the_document_of_a_teacher_that_is_in_it(folder):
    before = (folder / "complete.json").read_bytes()
    with pytest.raises(Stop):
        build_tiny(
            folder, teachers=tiny_teachers(3), codec=CODES, add_teachers=True, on_progress=stop_at_its_second_shard
        )
    (folder / "commits/c/2.json").unlink(missing_ok=True)
    lose(folder / "complete.json")
    cut(folder / "teachers/a/zarr.json")
    assert repair_cache(folder).is_complete
    assert (folder / "complete.json").read_bytes() == before


DOCUMENT = "teachers/a/zarr.json"


def alter(path, before='"num_pilot_rows": 40', after='"num_pilot_rows": 41'):
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_a_document_that_shards_were_not_encoded_under_comes_back_from_the_copy_in_the_root(folder):
    sound, before = (folder / DOCUMENT).read_bytes(), (folder / "complete.json").read_bytes()
    lose(folder / "complete.json")
    alter(folder / DOCUMENT)
    assert [item.key for item in kdcache.verify_cache(folder, level="quick").findings] == [DOCUMENT]
    assert done(repair_cache(folder)) == [("write", DOCUMENT), ("write", "zarr.json"), ("write", "complete.json")]
    assert (folder / DOCUMENT).read_bytes() == sound
    assert (folder / "complete.json").read_bytes() == before


def test_a_document_that_shards_were_not_encoded_under_is_not_vouched_for(folder):
    lose(folder / "complete.json")
    alter(folder / DOCUMENT)
    alter(folder / "zarr.json")
    report = repair_cache(folder)
    assert ("cannot", DOCUMENT) in done(report)
    assert not report.is_complete
    assert not (folder / "complete.json").exists()


def test_a_record_that_names_another_document_than_the_others_is_dropped(folder):
    lose(folder / "complete.json")
    record = Record.from_json((folder / RECORD).read_bytes(), source=RECORD)
    (folder / RECORD).write_bytes(record.model_copy(update={"document_digest": "0" * 64}).to_json())
    assert [item.key for item in kdcache.verify_cache(folder, level="quick").findings] == [RECORD]
    assert done(repair_cache(folder))[0] == ("drop", RECORD)


def test_where_most_records_name_another_document_it_is_the_one_at_fault(folder):
    lose(folder / "complete.json")
    for shard in (0, 1):
        path = folder / f"commits/a/{shard}.json"
        record = Record.from_json(path.read_bytes(), source=path.name)
        path.write_bytes(record.model_copy(update={"document_digest": "0" * 64}).to_json())
    assert [item.key for item in kdcache.verify_cache(folder, level="quick").findings] == [DOCUMENT]
    assert ("cannot", DOCUMENT) in done(repair_cache(folder))
    assert len([*(folder / "commits/a").iterdir()]) == 3


def test_damage_to_the_root_is_blamed_on_no_other_file(folder):
    lose(folder / "complete.json")
    cut(folder / "zarr.json")
    assert {item.key for item in kdcache.verify_cache(folder, level="deep").findings} == {"zarr.json"}
    repair_cache(folder)
    assert kdcache.verify_cache(folder, level="deep").findings == ()
    assert (folder / "complete.json").exists()


def test_a_finished_teacher_is_not_taken_out_of_the_cache_by_a_lost_completion(folder):
    for name in ("complete.json", "commits/b/0.json", "teachers/b/codes/c/0/0"):
        lose(folder / name)
    assert not repair_cache(folder).is_complete
    with pytest.raises(IncompleteCacheError):
        open_cache(folder)


def test_foreign_files_are_left_alone(folder):
    (folder / "README.txt").write_text("mine")
    cut(folder / SHARD)
    repair(folder)
    assert (folder / "README.txt").read_text() == "mine"


def test_a_file_too_many_in_the_index_is_left_and_named(folder):
    (folder / "index/readme").write_text("mine")
    (action,) = repair_cache(folder).hopeless
    assert (action.key, action.then) == ("index/readme", "Move the file out of the cache.")


@pytest.mark.parametrize("name", ["examples.parquet", *PARAMETERS])
def test_what_was_fitted_or_given_is_left_as_it_is_and_named(folder, name):
    cut(place(folder, name))
    before = files_of(folder)
    report = repair_cache(folder)
    assert (report.command, report.hopeless) == ("kdcache repair JOB", ())
    assert files_of(folder) == before


def test_a_lost_teacher_document_of_an_unfinished_cache_cannot_be_mended(folder):
    for name in ("complete.json", "zarr.json", "teachers/a/zarr.json"):
        cut(folder / name)
    (action,) = repair_cache(folder).hopeless
    assert action.key == "teachers/a/zarr.json"
    assert "Bring the file back from a copy; or delete complete.json, commits/a and teachers/a" in action.then


def test_a_lost_plan_of_a_single_build_is_written_from_the_call(tmp_path):
    build_tiny(tmp_path / "cache", codec=CODES)
    before = files_of(tmp_path / "cache")
    lose(tmp_path / "cache/plans/0.json")
    options = {"shard_rows": 16, "chunk_rows": 8, "batch_size": 12, "codec": CODES}
    (action,) = repair_cache(tmp_path / "cache").hopeless
    assert "Run `kdcache repair JOB`, with the cache's job file, which may tell what it was" in action.then
    repair(tmp_path / "cache", **options)
    assert files_of(tmp_path / "cache") == before


# Dry runs, second readings, options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_dry_run_names_what_would_be_done_and_changes_nothing(folder, name):
    cut(place(folder, name))
    before = files_of(folder)
    report = repair(folder, dry_run=True)
    assert report.is_dry_run
    assert report.actions
    assert files_of(folder) == before


def test_a_shard_that_reads_right_the_second_time_is_kept(folder, monkeypatch):
    real, readings = verifying.digest_of, []

    def unsteady(store, key):
        readings.append(key)
        return "0" * 64 if key == SHARD and readings.count(SHARD) == 1 else real(store, key)

    monkeypatch.setattr(verifying, "digest_of", unsteady)
    standing = (folder / SHARD).read_bytes()
    report = repair_cache(folder)
    assert (folder / SHARD).read_bytes() == standing
    assert ("keep", SHARD) in done(report)


def test_readers_of_an_open_cache_get_an_error_or_the_right_rows(folder):
    open_before = open_cache(folder)
    right = open_before.read([0, 20]).logits()
    cut(folder / SHARD)
    repair_cache(folder)
    with pytest.raises(CorruptCacheError):
        open_cache(folder, allow_incomplete=True).store.shard_bytes("a", 1)
    repair(folder)
    assert torch.equal(open_before.read([0, 20]).logits(), right)


def test_an_incomplete_reading_masks_what_was_dropped(folder):
    cut(folder / SHARD)
    repair_cache(folder)
    soft_targets = open_cache(folder, allow_incomplete=True).read([0, 20])
    assert soft_targets.available.tolist() == [True, False]


def test_where_no_cache_stands_nothing_is_repaired(tmp_path):
    with pytest.raises(CacheNotFoundError):
        repair_cache(tmp_path)


def test_a_job_says_all_by_itself(folder):
    with pytest.raises(OptionError, match="give it alone"):
        repair_cache(folder, job="job.toml")


def test_teachers_need_a_transfer_set(folder):
    with pytest.raises(OptionError, match="no transfer set to run them on"):
        repair_cache(folder, teachers=tiny_teachers(2))


def test_a_repair_needs_an_address():
    with pytest.raises(OptionError, match="give the cache's address, or its job"):
        repair_cache()


def test_nothing_is_deleted_while_a_dry_run_looks(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("a dry run writes")

    for name in ("delete", "replace", "publish"):
        monkeypatch.setattr(LocalObjects, name, refuse)
    cut(folder / SHARD)
    repair(folder, dry_run=True)


def test_a_lost_root_and_a_lost_part_of_the_index_are_both_written_anew(folder):
    (folder / "zarr.json").unlink()
    (folder / "index/fences/c/0/0").unlink()
    kdcache.repair_cache(folder)
    assert kdcache.verify_cache(folder).is_sound
