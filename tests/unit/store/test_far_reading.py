"""Reading what lies far away: no request that can be spared, and those of several shards at once."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest
from tiny_caches import NUM_EXAMPLES, build_tiny

from kdcache import SoftTargetLoader, open_cache
from kdcache.build.task import remaining_shards
from kdcache.errors import CorruptCacheError
from kdcache.store import LocalObjects
from kdcache.store.at_once import THREADS, at_once
from kdcache.store.checksums import with_checksum

SHARD = "teachers/a/codes/c/{}/0"
RECORD = "commits/a/{}.json"
SHARD_ROWS = 8
NUM_SHARDS = NUM_EXAMPLES // SHARD_ROWS
SECONDS = 20


class FarObjects(LocalObjects):
    """Objects of a folder that note what is asked of shards and records, and may wait until all are asked at once."""

    request_bytes = 2**20
    asked: list[tuple[str, str]]
    barrier: threading.Barrier | None

    def read(self, key, *, max_bytes=None):
        self._note("read", key)
        return super().read(key, max_bytes=max_bytes)

    def size(self, key):
        self._note("size", key)
        return super().size(key)

    def sizes(self, prefix):
        self._note("sizes", f"{prefix}/")
        return {key: (self._root / key).stat().st_size for key in self.list(prefix)}

    def read_sized(self, key, start, length, *, believed_bytes):  # noqa: ARG002 - files tell their size
        self._note("read_sized", key)
        data = (self._root / key).read_bytes()
        return data[start : start + length], len(data)

    def read_ranges(self, key, ranges):
        self._note("read_ranges", key)
        return iter([part.copy() for part in super().read_ranges(key, ranges)])

    def _note(self, verb, key):
        if "/c/" in key or key.startswith("commits/"):
            self.asked.append((verb, key))
            if self.barrier is not None:
                self.barrier.wait()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("far") / "cache"
    build_tiny(folder, shard_rows=SHARD_ROWS, chunk_rows=4)
    return folder


@pytest.fixture(scope="module")
def near(built):
    """The same cache, read as files."""
    return open_cache(built)


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


@pytest.fixture
def asked(monkeypatch):
    """What is asked of far shards and records from now on; caches that are opened lie far away."""
    monkeypatch.setattr(FarObjects, "asked", noted := [], raising=False)
    monkeypatch.setattr(FarObjects, "barrier", None, raising=False)
    monkeypatch.setattr("kdcache.store.store.open_objects", FarObjects)
    return noted


def test_the_first_rows_of_a_small_shard_take_its_record_and_one_request(folder, asked):
    open_cache(folder).read_rows(np.array([0, 5]), teachers="a")
    assert asked == [("read", RECORD.format(0)), ("read_sized", SHARD.format(0))]


def test_the_first_rows_of_a_large_shard_take_its_record_its_index_and_the_chunks(folder, asked, monkeypatch):
    monkeypatch.setattr(FarObjects, "request_bytes", 1)
    open_cache(folder).read_rows(np.array([0, 5]), teachers="a")
    assert asked == [("read", RECORD.format(0)), ("read_sized", SHARD.format(0)), ("read_ranges", SHARD.format(0))]


def test_further_rows_of_a_shard_take_one_request(folder, asked):
    cache = open_cache(folder)
    cache.read_rows(np.array([0]), teachers="a")
    asked.clear()
    cache.read_rows(np.array([7]), teachers="a")
    assert asked == [("read_ranges", SHARD.format(0))]


READS = {
    "scattered rows": lambda cache: cache.read_rows(np.arange(0, NUM_EXAMPLES, SHARD_ROWS), teachers="a"),
    "all rows in memory": lambda cache: cache.resident_codes(teachers="a")[0].fill(np.arange(NUM_EXAMPLES)),
    "rows of a window": lambda cache: cache.codes_readers(teachers="a")[0].scatter(
        np.arange(NUM_EXAMPLES), np.empty((NUM_EXAMPLES, 5), np.float32), np.arange(NUM_EXAMPLES)
    ),
    "all indexes": lambda cache: cache.codes_readers(teachers="a")[0].prepare(),
}


@pytest.fixture(params=READS)
def read(request):
    return READS[request.param]


def test_shards_that_are_first_read_together_are_asked_for_at_once(folder, asked, monkeypatch, read):
    cache = open_cache(folder)
    cache.codes_readers(teachers="a")
    monkeypatch.setattr(FarObjects, "barrier", threading.Barrier(NUM_SHARDS, timeout=SECONDS))
    read(cache)
    assert sorted(asked) == sorted(
        pair
        for shard in range(NUM_SHARDS)
        for pair in [("read", RECORD.format(shard)), ("read_sized", SHARD.format(shard))]
    )


@pytest.mark.parametrize("request_bytes", [1, 2**20], ids=["large shards", "small shards"])
@pytest.mark.usefixtures("asked")
def test_rows_that_come_from_far_are_right(built, near, monkeypatch, request_bytes):
    monkeypatch.setattr(FarObjects, "request_bytes", request_bytes)
    rows = np.random.default_rng(0).permutation(NUM_EXAMPLES)
    expected = [codes.tolist() for codes in near.read_rows(rows).codes]
    far = open_cache(built)
    assert [codes.tolist() for codes in far.read_rows(rows).codes] == expected
    far.hold_in_memory()
    assert [codes.tolist() for codes in far.read_rows(rows).codes] == expected


@pytest.mark.parametrize("tier", ["memory", "windows", "scattered"])
@pytest.mark.usefixtures("asked")
def test_an_epoch_from_far_is_that_of_a_folder(built, near, tier):
    options = {"batch_size": 8, "seed": 0, "tier": tier, "shuffle": "windowed"}
    far = [batch[-1].logits().tolist() for batch in SoftTargetLoader(open_cache(built), **options)]
    assert far == [batch[-1].logits().tolist() for batch in SoftTargetLoader(near, **options)]


def test_what_is_fetched_before_its_turn_is_bounded_in_bytes(folder, near, asked, monkeypatch):
    monkeypatch.setattr("kdcache.store.reader._AHEAD_BYTES", 1)
    monkeypatch.setattr(FarObjects, "request_bytes", 1)
    found = open_cache(folder).read_rows(np.arange(NUM_EXAMPLES), teachers="a").codes[0]
    keys = [key for verb, key in asked if verb == "read_ranges"]
    assert keys == [SHARD.format(shard) for shard in range(NUM_SHARDS)]
    assert found.tolist() == near.read_rows(np.arange(NUM_EXAMPLES), teachers="a").codes[0].tolist()


def test_what_lies_between_chunks_counts_as_fetched(tmp_path, asked, monkeypatch):
    build_tiny(tmp_path / "cache", shard_rows=SHARD_ROWS, chunk_rows=1)
    cache = open_cache(tmp_path / "cache")
    chunk_bytes = cache.codes_readers(teachers="a")[0].spec.chunk_bytes
    monkeypatch.setattr(FarObjects, "request_bytes", 2 * chunk_bytes)
    rows = np.concatenate([np.array([0, 3]), np.array([0, 3]) + SHARD_ROWS])
    monkeypatch.setattr(FarObjects, "barrier", threading.Barrier(2, timeout=0.5))
    monkeypatch.setattr("kdcache.store.reader._AHEAD_BYTES", 7 * chunk_bytes)
    with pytest.raises(threading.BrokenBarrierError):  # one after the other: each alone waits for ever
        cache.read_rows(rows, teachers="a")
    FarObjects.barrier.reset()
    monkeypatch.setattr("kdcache.store.reader._AHEAD_BYTES", 8 * chunk_bytes)
    cache.read_rows(rows, teachers="a")
    assert ("read_ranges", SHARD.format(1)) in asked


def test_whether_all_shards_are_there_is_one_list(folder, asked):
    open_cache(folder).codes_readers(teachers="a")[0].check_shards()
    assert asked == [("sizes", "teachers/a/codes/c/")]


def test_the_sizes_of_a_cache_are_one_list(folder, asked):
    open_cache(folder).sizes()
    assert [key for verb, key in asked if verb == "size"] == []


def test_a_resume_asks_for_the_sizes_of_all_shards_in_one_list(folder, asked):
    cache = open_cache(folder)
    asked.clear()
    assert remaining_shards(cache.store, cache.document, "a") == []
    assert [(verb, key) for verb, key in asked if verb.startswith("size")] == [("sizes", "teachers/a/codes/c/")]


DAMAGES = {
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing in it": lambda path: path.write_bytes(b""),
}


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("request_bytes", [1, 2**20], ids=["large shards", "small shards"])
def test_a_shard_of_another_size_than_its_record_names_is_refused(folder, monkeypatch, read, damage, request_bytes):
    monkeypatch.setattr(FarObjects, "request_bytes", request_bytes)
    DAMAGES[damage](folder / SHARD.format(3))
    told = rf"{SHARD.format(3)}: the shard has \d+ bytes, and its record names \d+.*kdcache repair JOB"
    with pytest.raises(CorruptCacheError, match=told):
        read(open_cache(folder))


@pytest.mark.usefixtures("asked")
def test_a_shard_that_is_missing_is_named(folder, read):
    (folder / SHARD.format(3)).unlink()
    with pytest.raises(CorruptCacheError, match=f"{SHARD.format(3)}: the shard is missing"):
        read(open_cache(folder))


@pytest.fixture
def pages(tmp_path):
    return tmp_path / "pages"


def read_all(folder, pages):
    return open_cache(folder, local_cache=pages).read_rows(np.arange(NUM_EXAMPLES), teachers="a").codes[0].tolist()


def test_a_cache_that_was_read_whole_is_read_again_without_a_request(folder, asked, pages):
    first = read_all(folder, pages)
    asked.clear()
    assert read_all(folder, pages) == first
    assert asked == []


def test_records_of_a_cache_that_was_read_in_part_are_read_where_they_lie(folder, asked, pages):
    open_cache(folder, local_cache=pages).read_rows(np.array([0]), teachers="a")
    asked.clear()
    open_cache(folder, local_cache=pages).read_rows(np.array([0]), teachers="a")
    assert asked == [("read", RECORD.format(0))]


def test_records_that_complete_json_does_not_vouch_for_are_never_believed_when_kept(folder, asked, pages):
    record = folder / RECORD.format(2)
    sound = record.read_bytes()
    record.write_bytes(sound.replace(b'"min_logit": -', b'"min_logit": -1'))
    assert record.read_bytes() != sound
    read_all(folder, pages)
    record.write_bytes(sound)
    asked.clear()
    read_all(folder, pages)
    assert {key for _, key in asked} == {RECORD.format(shard) for shard in range(NUM_SHARDS)}
    asked.clear()
    read_all(folder, pages)
    assert asked == []


def test_a_kept_record_that_was_altered_is_read_where_it_lies(folder, asked, pages):
    first = read_all(folder, pages)
    altered = [path for path in pages.glob("*/*.page") if b'"certificate"' in path.read_bytes()]
    assert len(altered) == NUM_SHARDS
    for path in altered:
        path.write_bytes(with_checksum(path.read_bytes()[:-4].replace(b'"shard_index":', b'"shard_index":1')))
    asked.clear()
    assert read_all(folder, pages) == first
    assert {key for _, key in asked} == {RECORD.format(shard) for shard in range(NUM_SHARDS)}


# At once --------------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_items():
    assert list(at_once(range(40), lambda item: time.sleep(0.001 * (item % 3)) or item)) == list(range(40))


class Counted:
    """Work that notes how much of it is under way."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now, self.most, self.begun = 0, 0, []

    def __call__(self, item):
        with self.lock:
            self.begun.append(item)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.005)
        with self.lock:
            self.now -= 1
        return item


def test_no_more_work_is_under_way_than_there_are_connections():
    counted = Counted()
    list(at_once(range(4 * THREADS), counted))
    assert 1 < counted.most <= THREADS


def test_no_more_is_begun_than_may_wait_for_its_turn():
    counted = Counted()
    results = at_once(range(10), counted, bytes_of=lambda _: 10, max_bytes=30)
    next(results)
    results.close()
    assert 0 in counted.begun
    assert set(counted.begun) <= {0, 1, 2}  # those that no thread had taken up are left


def test_an_error_comes_where_its_turn_is_and_ends_the_rest():
    begun = []
    results = at_once([1, 2, 0, *[4] * 100], lambda item: begun.append(item) or 8 // item)
    assert [next(results), next(results)] == [8, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) <= 3 + THREADS


def test_who_stops_waits_for_no_request_that_is_under_way():
    answers = threading.Event()
    results = at_once([0, *[1] * 20], lambda item: item and answers.wait(SECONDS))
    next(results)
    began = time.monotonic()
    results.close()
    took = time.monotonic() - began
    answers.set()
    assert took < SECONDS / 4
