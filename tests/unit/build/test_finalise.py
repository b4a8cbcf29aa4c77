from __future__ import annotations

import hashlib
import json

import pytest
from tiny_caches import build_tiny, files_of, tiny_teachers

from kdcache import Codes
from kdcache.build import read_status
from kdcache.build.finalise import finalise
from kdcache.cache import open_cache
from kdcache.errors import CacheNotFoundError, IncompleteCacheError
from kdcache.store import CacheStore
from kdcache.store.writers import this_machine


@pytest.fixture
def folder(tmp_path):
    build_tiny(tmp_path / "cache", codec=Codes(spacing="uniform"))
    return tmp_path / "cache"


@pytest.fixture
def complete(folder):
    return CacheStore.at(folder).complete()


def record(folder, shard):
    return json.loads((folder / f"commits/{shard}.json").read_text())


def test_completion_names_the_plan_in_force(folder, complete):
    digest = hashlib.sha256((folder / "plans/0.json").read_bytes()).hexdigest()
    assert (complete.plan_index, complete.plan_digest) == (0, digest)


def test_completion_names_the_digest_of_the_examples(folder, complete):
    assert complete.examples_sha256 == hashlib.sha256((folder / "examples.parquet").read_bytes()).hexdigest()


def test_completion_counts_each_teachers_shards_and_bytes(folder, complete):
    sizes = [path.stat().st_size for path in (folder / "teachers/a/codes/c").rglob("0") if path.is_file()]
    assert (complete.teachers[0].num_shards, complete.teachers[0].num_bytes) == (3, sum(sizes))


def test_completion_holds_a_digest_over_all_records(folder, complete):
    digests = [hashlib.sha256((folder / f"commits/a/{shard}.json").read_bytes()).hexdigest() for shard in range(3)]
    assert complete.teachers[0].records_digest == hashlib.sha256("\n".join(digests).encode()).hexdigest()


def test_a_teachers_mean_divergence_is_weighted_by_the_rows_measured(folder, complete):
    certificates = [record(folder, f"a/{shard}")["certificate"] for shard in range(3)]
    mean = sum(item["mean_kl"][1] * item["num_measured_rows"] for item in certificates) / 40
    assert complete.teachers[0].certificate.mean_kl[1] == pytest.approx(mean)


def test_a_teachers_largest_divergence_is_that_of_its_worst_shard(folder, complete):
    worst = max(record(folder, f"a/{shard}")["certificate"]["max_kl"][1] for shard in range(3))
    assert complete.teachers[0].certificate.max_kl[1] == worst


def test_a_teachers_error_range_is_that_of_its_worst_shard(folder, complete):
    worst = max(record(folder, f"b/{shard}")["certificate"]["max_error_range"] for shard in range(3))
    assert complete.teachers[1].certificate.max_error_range == worst


def test_equal_data_have_equal_data_digests(complete, tmp_path):
    again = build_tiny(tmp_path / "again", codec=Codes(spacing="uniform"))
    assert again.complete.data_digest == complete.data_digest


def test_other_data_have_other_data_digests(complete, tmp_path):
    other = build_tiny(tmp_path / "other", codec=Codes(spacing="companded"))
    assert other.complete.data_digest != complete.data_digest


def test_a_cache_with_a_missing_record_is_not_complete(folder):
    (folder / "complete.json").unlink()
    (folder / "commits/b/1.json").unlink()
    store = CacheStore.at(folder)
    with pytest.raises(
        IncompleteCacheError, match=r"teacher 'b' lacks 1 of 3 shards \(\[1\]\); the cache stays as it was"
    ):
        finalise(store, 0, store.plans()[0])
    assert not (folder / "complete.json").exists()


def test_finalising_twice_changes_nothing(folder):
    before = files_of(folder)
    store = CacheStore.at(folder)
    finalise(store, 0, store.plans()[0])
    assert files_of(folder) == before


def test_the_consolidated_metadata_hold_every_array(folder):
    metadata = json.loads((folder / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert {"teachers/a/codes", "teachers/b/codes", "index/entries", "index/fences"} <= set(metadata)


def test_the_consolidated_metadata_hold_an_added_teacher(folder):
    build_tiny(folder, teachers=tiny_teachers(3), codec=Codes(spacing="uniform"), add_teachers=True)
    metadata = json.loads((folder / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert "teachers/c/codes" in metadata


# Status ---------------------------------------------------------------------------------------------------------------


def lose(folder, *names):
    for name in names:
        (folder / name).unlink()


def test_a_finished_cache_is_complete(folder):
    assert read_status(folder).is_complete


def test_a_finished_cache_has_all_shards_rows_and_bytes(folder, complete):
    status = read_status(folder).teachers[0]
    assert (status.done_shards, status.num_shards, status.done_rows, status.num_rows) == (3, 3, 40, 40)
    assert status.num_bytes == complete.teachers[0].num_bytes


def test_shards_without_a_record_are_not_done(folder):
    lose(folder, "complete.json", "commits/b/1.json")
    teachers = read_status(folder).teachers
    assert [(item.name, item.done_shards, item.done_rows) for item in teachers] == [("a", 3, 40), ("b", 2, 24)]


def test_a_cache_without_its_last_document_is_not_complete(folder):
    lose(folder, "complete.json")
    assert not read_status(folder).is_complete


def test_a_cache_to_which_a_teacher_is_being_added_is_not_complete(folder):
    build_tiny(folder, teachers=tiny_teachers(3), codec=Codes(spacing="uniform"), add_teachers=True)
    lose(folder, "complete.json")
    store = CacheStore.at(folder)
    finalise(store, 0, store.plans()[0])
    assert not read_status(folder).is_complete


def test_a_late_builder_of_an_earlier_plan_takes_no_teacher_out(folder):
    build_tiny(folder, teachers=tiny_teachers(3), codec=Codes(spacing="uniform"), add_teachers=True)
    store = CacheStore.at(folder)
    finalise(store, 0, store.plans()[0])
    assert open_cache(folder).teacher_names == ("a", "b", "c")


def test_a_plan_alone_has_a_status(folder):
    plan = (folder / "plans/0.json").read_bytes()
    bare = folder.parent / "bare"
    (bare / "plans").mkdir(parents=True)
    (bare / "plans/0.json").write_bytes(plan)
    assert [(item.name, item.done_shards, item.num_shards) for item in read_status(bare).teachers] == [
        ("a", 0, 3),
        ("b", 0, 3),
    ]


def test_a_merged_cache_has_the_status_of_its_one_array(tmp_path):
    build_tiny(tmp_path / "merged", merge="geometric")
    assert [item.name for item in read_status(tmp_path / "merged").teachers] == ["geometric-mean"]


def test_where_no_build_was_begun_there_is_no_status(tmp_path):
    with pytest.raises(
        CacheNotFoundError, match=r"holds no cache and no plan of one\. Check the address, or run `kdcache build"
    ):
        read_status(tmp_path)


def test_reading_a_status_changes_nothing(folder):
    before = files_of(folder)
    read_status(folder)
    assert files_of(folder) == before


def test_what_dead_writers_left_is_swept_up(folder):
    lose(folder, "complete.json")
    left = folder / "commits" / "a" / f".0.json.{this_machine()}-999999999-{'0' * 16}.partial"
    left.write_bytes(b"torn")
    store = CacheStore.at(folder)
    finalise(store, 0, store.plans()[0])
    assert not left.exists()
