"""A repair that stops between any two of its writes leaves no cache that reads wrong, and goes on when run again.

Every change that a repair makes goes through `Objects`; here it stops before its k-th, for every k.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from damage import cut, flip, lose, place
from tiny_caches import Stop, StoppingObjects, build_tiny, files_of, tiny_teachers, tiny_transfer_set

from kdcache import Codes, open_cache, repair_cache
from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.store import store as store_module

CODES = Codes(spacing="uniform")
NUM_CHANGES = 22
QUICK = (0, 1, 3, 5, 9, 13, 19, 21)
ALL = [pytest.param(at, marks=[] if at in QUICK else pytest.mark.slow) for at in range(NUM_CHANGES)]


class StoppingDeletes(StoppingObjects):
    """Stops before its change number `at`, deletions counted too."""

    def delete(self, key):
        self._count()
        return super().delete(key)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair-stops") / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A cache with damage of every sort that a repair mends."""
    folder = shutil.copytree(built, tmp_path / "cache")
    flip(folder / "teachers/a/codes/c/0/0")
    cut(folder / "teachers/b/codes/c/2/0")
    lose(folder / "teachers/b/codes/c/1/0")
    cut(folder / "commits/a/2.json")
    lose(folder / "plans/0.json")
    flip(folder / "index/entries/c/0/0")
    cut(folder / "teachers/a/codes/zarr.json")
    flip(folder / "examples.parquet")
    lose(place(folder, "teachers/a/PARAMETERS/codebook/c/0"))
    return folder


def repair(folder):
    return repair_cache(folder, tiny_transfer_set(), tiny_teachers(2))


def stop_before(monkeypatch, at):
    changes = itertools.count()
    monkeypatch.setattr(store_module, "open_objects", lambda root: StoppingDeletes(root, changes, at))
    return changes


def repair_until(folder, monkeypatch, at):
    with monkeypatch.context() as patch:
        stop_before(patch, at)
        with pytest.raises(Stop):
            repair(folder)


def test_a_repair_has_at_least_as_many_changes_as_are_stopped_here(folder, monkeypatch):
    changes = stop_before(monkeypatch, None)
    repair(folder)
    assert next(changes) >= NUM_CHANGES


@pytest.mark.parametrize("at", ALL)
def test_a_stopped_repair_goes_on_when_it_is_run_again(folder, built, monkeypatch, at):
    repair_until(folder, monkeypatch, at)
    assert repair(folder).is_complete
    assert files_of(folder) == files_of(built)


@pytest.mark.parametrize("at", ALL)
def test_a_reader_of_a_stopped_repair_gets_an_error_or_the_right_rows(folder, built, monkeypatch, at):
    right = open_cache(built).read(range(40)).logits()
    repair_until(folder, monkeypatch, at)
    with contextlib.suppress(KdcacheError):
        assert torch.equal(open_cache(folder).read(range(40)).logits(), right)


@pytest.mark.parametrize("at", ALL)
def test_what_an_incomplete_reading_of_a_stopped_repair_shows_is_right(folder, built, monkeypatch, at):
    right = open_cache(built).read(range(40)).logits()
    repair_until(folder, monkeypatch, at)
    with contextlib.suppress(KdcacheError):
        read = open_cache(folder, allow_incomplete=True).read(range(40))
        available = slice(None) if read.available is None else read.available
        assert torch.equal(read[available].logits(), right[available])


def test_a_repair_stopped_again_and_again_comes_to_its_end(folder, built, monkeypatch):
    for at in range(0, NUM_CHANGES, 3):
        with monkeypatch.context() as patch:
            stop_before(patch, at)
            with contextlib.suppress(Stop):
                repair(folder)
    repair(folder)
    assert files_of(folder) == files_of(built)


def test_builders_at_work_are_not_harmed_by_a_repair_beside_them(folder, built):
    def build(teachers):
        with contextlib.suppress(CorruptCacheError):  # of a shard that the repair has not come to yet
            build_tiny(folder, teachers=teachers, codec=CODES)

    teachers = [tiny_teachers(2) for _ in range(3)]  # seeds are the process's
    repair_cache(folder, tiny_transfer_set())  # plans and examples, without which no build begins
    cut(folder / "teachers/a/codes/c/1/0")
    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(build, teachers[number]) for number in range(2)]
        pool.submit(repair_cache, folder, tiny_transfer_set(), teachers[2]).result()
    assert [item.result() for item in builds] == [None, None]
    repair(folder)
    assert files_of(folder) == files_of(built)
