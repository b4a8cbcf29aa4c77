"""A build that stops between any two of its writes is finished by the same call, byte for byte.

Every write of a build goes through `Objects`; here they stop before their k-th write, for every k. `test_kill.py` does
the same to real processes, at moments that nobody chose.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
from tiny_caches import Stop, StoppingObjects, build_tiny, files_of, tiny_teachers, tiny_transfer_set

import kdcache
from kdcache import Codes, open_cache, verify_cache
from kdcache.errors import CacheNotFoundError, KdcacheError
from kdcache.store import store as store_module

OPTIONS = {"codec": Codes(spacing="uniform"), "num_pilot_rows": 12}
NUM_WRITES = 33
NUM_WRITES_TO_ADD = 27


def build(folder, count=1, **options):
    return build_tiny(folder, tiny_transfer_set(32), tiny_teachers(count), **OPTIONS, **options)


def stop_before(monkeypatch, at):
    writes = itertools.count()
    monkeypatch.setattr(store_module, "open_objects", lambda root: StoppingObjects(root, writes, at))
    return writes


def build_until(folder, monkeypatch, at, **options):
    with monkeypatch.context() as patch:
        stop_before(patch, at)
        with pytest.raises(Stop):
            build(folder, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    build(folder, count=2)
    return folder


@pytest.fixture(scope="module")
def undisturbed_addition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    build(folder)
    build(folder, count=2, add_teachers=True)
    return folder


def test_a_build_has_as_many_writes_as_are_stopped_here(tmp_path, monkeypatch):
    writes = stop_before(monkeypatch, None)
    build(tmp_path / "cache", count=2)
    assert next(writes) == NUM_WRITES


@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_a_stopped_build_is_finished_with_the_files_of_an_undisturbed_one(tmp_path, monkeypatch, undisturbed, at):
    build_until(tmp_path / "cache", monkeypatch, at, count=2)
    build(tmp_path / "cache", count=2)
    assert files_of(tmp_path / "cache") == files_of(undisturbed)


@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_a_stopped_build_never_opens_as_a_whole_cache(tmp_path, monkeypatch, at):
    build_until(tmp_path / "cache", monkeypatch, at, count=2)
    with pytest.raises(KdcacheError):
        open_cache(tmp_path / "cache")


@pytest.mark.parametrize(
    "at", [0, 1, 2, 4, 8, *(pytest.param(at, marks=pytest.mark.slow) for at in range(9, NUM_WRITES))]
)
def test_nothing_is_wrong_with_what_a_stopped_build_leaves(tmp_path, monkeypatch, at):
    build_until(tmp_path / "cache", monkeypatch, at, count=2)
    with contextlib.suppress(CacheNotFoundError):  # it stopped before its first write
        assert verify_cache(tmp_path / "cache", level="deep").findings == ()


def test_adding_a_teacher_has_as_many_writes_as_are_stopped_here(tmp_path, monkeypatch):
    build(tmp_path / "cache")
    writes = stop_before(monkeypatch, None)
    build(tmp_path / "cache", count=2, add_teachers=True)
    assert next(writes) == NUM_WRITES_TO_ADD


@pytest.mark.parametrize("at", range(NUM_WRITES_TO_ADD))
def test_a_stopped_addition_leaves_the_cache_as_it_was_for_readers(tmp_path, monkeypatch, at):
    build(tmp_path / "cache")
    build_until(tmp_path / "cache", monkeypatch, at, count=2, add_teachers=True)
    assert open_cache(tmp_path / "cache").teacher_names == ("a",)
    assert verify_cache(tmp_path / "cache").is_sound


@pytest.mark.parametrize("at", range(NUM_WRITES_TO_ADD))
def test_a_stopped_addition_is_finished_with_the_files_of_an_undisturbed_one(
    tmp_path, monkeypatch, undisturbed_addition, at
):
    build(tmp_path / "cache")
    build_until(tmp_path / "cache", monkeypatch, at, count=2, add_teachers=True)
    build(tmp_path / "cache", count=2, add_teachers=True)
    assert files_of(tmp_path / "cache") == files_of(undisturbed_addition)


def test_a_build_stopped_again_and_again_is_finished_at_last(tmp_path, monkeypatch, undisturbed):
    for at in range(NUM_WRITES):
        with monkeypatch.context() as patch:
            stop_before(patch, at)
            with contextlib.suppress(Stop):
                build(tmp_path / "cache", count=2)
    assert build(tmp_path / "cache", count=2).complete == kdcache.open_cache(undisturbed).complete
