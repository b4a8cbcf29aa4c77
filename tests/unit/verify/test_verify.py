from __future__ import annotations

import json
import shutil
import time

import pytest
from damage import FILES, lose, place, swap
from tiny_caches import build_tiny, files_of, tiny_teachers

from kdcache import Codes, repair_cache, verify_cache
from kdcache.errors import CacheNotFoundError, KdcacheError

CODES = Codes(spacing="uniform")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache to which a second teacher was added."""
    folder = tmp_path_factory.mktemp("verify") / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


def is_sound(folder) -> bool:
    """Whether nothing is found; a root that cannot be read at all is an error instead."""
    try:
        return verify_cache(folder).is_sound
    except KdcacheError:
        return False


def findings(folder) -> list[str]:
    return [f"{finding.where}: {finding.what}" for finding in verify_cache(folder).findings]


def test_a_sound_cache_has_no_findings(folder):
    report = verify_cache(folder)
    assert (report.is_sound, report.is_complete, report.findings) == (True, True, ())


def test_every_shard_is_held_against_its_record(folder):
    sizes = [path.stat().st_size for path in folder.glob("teachers/*/codes/c/*/0")]
    report = verify_cache(folder)
    assert (report.num_shards, report.num_bytes) == (6, sum(sizes))


def test_progress_counts_shards(folder):
    steps = []
    verify_cache(folder, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 6) for done in range(1, 7)]


def test_verifying_changes_nothing(folder):
    before = files_of(folder)
    verify_cache(folder)
    assert files_of(folder) == before


def test_a_merged_cache_verifies(tmp_path):
    build_tiny(tmp_path / "merged", merge="geometric")
    assert verify_cache(tmp_path / "merged").is_sound


def test_where_no_cache_stands_nothing_is_verified(tmp_path):
    with pytest.raises(CacheNotFoundError):
        verify_cache(tmp_path)


# Damage ---------------------------------------------------------------------------------------------------------------


def test_the_files_below_are_of_every_kind_that_a_cache_has(folder):
    named = {place(folder, name).relative_to(folder).as_posix() for name in FILES}
    assert named <= set(files_of(folder))
    left = {name for name in files_of(folder) if name not in named and not name.startswith(("teachers/", "commits/"))}
    assert left == set()


@pytest.mark.parametrize("where", [0.0, 0.13, 0.29, 0.5, 0.71, 0.87, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_found(folder, name, where):
    path = place(folder, name)
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    assert not is_sound(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != "complete.json"])
def test_a_lost_file_is_found(folder, name):
    place(folder, name).unlink()
    assert not is_sound(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_found(folder, name):
    path = place(folder, name)
    path.write_bytes(path.read_bytes()[:-5])
    assert not is_sound(folder)


def test_a_lost_completion_makes_an_incomplete_cache(folder):
    (folder / "complete.json").unlink()
    report = verify_cache(folder)
    assert (report.is_complete, report.is_sound) == (False, True)


def test_two_swapped_shards_are_both_named(folder):
    swap(folder, "teachers/a/codes/c/0/0", "teachers/a/codes/c/1/0")
    report = verify_cache(folder)
    assert {(finding.teacher, finding.shard_index) for finding in report.findings} == {("a", 0), ("a", 1)}


def test_shards_swapped_between_teachers_are_found(folder):
    swap(folder, "teachers/a/codes/c/0/0", "teachers/b/codes/c/0/0")
    report = verify_cache(folder)
    assert {(finding.teacher, finding.shard_index) for finding in report.findings} == {("a", 0), ("b", 0)}


def test_shards_swapped_together_with_their_records_are_found(folder):
    swap(folder, "teachers/a/codes/c/0/0", "teachers/a/codes/c/1/0")
    swap(folder, "commits/a/0.json", "commits/a/1.json")
    assert not is_sound(folder)


def test_two_swapped_teachers_are_found(folder):
    shutil.move(folder / "teachers/a", folder / "teachers/x")
    shutil.move(folder / "teachers/b", folder / "teachers/a")
    shutil.move(folder / "teachers/x", folder / "teachers/b")
    assert not is_sound(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "teachers/b/codes/c/1/0").unlink()
    found = findings(folder)
    assert len(found) == 1
    assert found[0].startswith(f"teacher 'b', shard 1: {folder}/teachers/b/codes/c/1/0: the file is missing")


def test_an_altered_shard_is_named_with_both_digests(folder):
    path = folder / "teachers/b/codes/c/1/0"
    path.write_bytes(path.read_bytes()[::-1])
    assert [item.split(" it has digest")[0] for item in findings(folder)] == [
        "teacher 'b', shard 1: its bytes were changed:"
    ]


def test_a_missing_record_of_a_finished_cache_is_found(folder):
    (folder / "commits/b/1.json").unlink()
    assert "teacher 'b', shard 1: there is no record" in findings(folder)


def test_every_finding_is_told_not_the_first_alone(folder):
    (folder / "teachers/a/codes/c/0/0").unlink()
    (folder / "teachers/b/codes/c/2/0").write_bytes(b"torn")
    (folder / "examples.parquet").write_bytes(b"torn")
    (folder / "teachers/b/zarr.json").write_bytes(b"torn")
    wheres = {finding.where for finding in verify_cache(folder).findings}
    assert {"teacher 'a', shard 0", "teacher 'b', shard 2", "examples.parquet", "teacher 'b'"} <= wheres


def change(folder, name, **changes):
    path = place(folder, name)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def test_a_record_of_fewer_rows_is_found(folder):
    certificate = json.loads((folder / "commits/a/2.json").read_text())["certificate"]
    unbounded = {name: value for name, value in certificate.items() if name not in ("bounds", "max_error_range")}
    change(folder, "commits/a/2.json", num_rows=7, certificate=unbounded)
    assert "teacher 'a', shard 2: its record says 7 rows, the layout 8" in findings(folder)


def test_a_certificate_made_better_in_the_completion_is_found(folder):
    document = json.loads((folder / "complete.json").read_text())
    document["teachers"][1]["certificate"]["max_kl"][0] = 0.0
    (folder / "complete.json").write_text(json.dumps(document))
    assert any("certificate.max_kl[0] is " in item for item in findings(folder))


def test_a_document_written_another_way_is_found(folder):
    change(folder, "commits/a/0.json")
    assert findings(folder) == [
        "teacher 'a', shard 0: the bytes of commits/a/0.json are not as kdcache writes them: it was altered"
    ]


def test_a_certificate_made_better_in_a_record_is_found(folder):
    record = json.loads((folder / "commits/a/0.json").read_text())
    change(folder, "commits/a/0.json", certificate={**record["certificate"], "max_error_range": 0.0})
    assert any("records_digest" in item for item in findings(folder))


def test_a_plan_that_does_not_follow_the_one_before_it_is_found(folder):
    change(folder, "plans/0.json", batch_size=99)
    assert any(item.startswith("plans/1.json: names ") for item in findings(folder))


def test_a_root_that_contradicts_the_plan_is_found(folder):
    root = json.loads((folder / "zarr.json").read_text())
    root["attributes"]["kdcache"]["has_labels"] = False
    (folder / "zarr.json").write_text(json.dumps(root))
    assert "zarr.json: says has_labels is False, plans/0.json says True" in findings(folder)


# Unfinished caches ----------------------------------------------------------------------------------------------------


def test_an_unfinished_cache_is_sound_and_incomplete(folder):
    for name in ("complete.json", "commits/b/1.json", "teachers/b/codes/c/1/0"):
        (folder / name).unlink()
    report = verify_cache(folder)
    assert (report.is_sound, report.is_complete) == (True, False)


def test_damage_to_what_an_unfinished_cache_has_is_found(folder):
    for name in ("complete.json", "commits/b/1.json", "teachers/b/codes/c/1/0", "teachers/a/codes/c/2/0"):
        (folder / name).unlink()
    assert [finding.shard_index for finding in verify_cache(folder).findings] == [2]


def test_a_teacher_that_is_being_added_is_no_finding(folder):
    before = shutil.copytree(folder, folder.parent / "before")
    build_tiny(folder, teachers=tiny_teachers(3), codec=CODES, add_teachers=True)
    for name in ("complete.json", "zarr.json"):
        (folder / name).write_bytes((before / name).read_bytes())
    (folder / "commits/c/1.json").unlink()
    report = verify_cache(folder)
    assert (report.findings, report.num_shards) == ((), 8)


# Of strangers ---------------------------------------------------------------------------------------------------------


def test_an_unfinished_cache_that_claims_very_many_shards_costs_what_stands_of_it(folder):
    lose(folder / "complete.json")
    for name in ("zarr.json", "plans/0.json", "plans/1.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"num_rows": 40', '"num_rows": 16000000000'))
    start = time.monotonic()
    report = verify_cache(folder)
    repair = repair_cache(folder, dry_run=True)
    assert time.monotonic() - start < 20
    assert report.num_shards == 6
    assert repair.num_missing_shards == 2 * 1_000_000_000 - 4  # the last of each teacher now has too few rows


def test_plans_with_absurd_numbers_are_told_and_not_counted_up_to(folder):
    shutil.copy(folder / "plans/0.json", folder / "plans/99999999999.json")
    start = time.monotonic()
    found = [item for item in verify_cache(folder).findings if item.key == "plans/99999999999.json"]
    assert time.monotonic() - start < 20
    assert [(item.kind, item.what) for item in found] == [
        ("contradicts", "its number is 99999999999, where 2 plan(s) stand: they are numbered one by one")
    ]
