"""Documents that were altered and still are valid: nothing comes to vouch for them, and no rows are decoded by them."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from tiny_caches import build_tiny, tiny_teachers, tiny_transfer_set

import kdcache
from kdcache import Codes, open_cache, repair_cache, verify_cache
from kdcache.errors import CorruptCacheError, StoreError

CODES = Codes(spacing="companded")
DOCUMENT = "teachers/a/zarr.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("altered") / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


def alter_spacing(folder):
    metadata = json.loads((folder / DOCUMENT).read_text())
    metadata["attributes"]["kdcache"]["codec"]["spacing"] = "uniform"
    (folder / DOCUMENT).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def test_adding_a_teacher_does_not_vouch_for_an_altered_document(folder):
    alter_spacing(folder)
    before = (folder / "complete.json").read_bytes()
    with pytest.raises(
        CorruptCacheError, match="the document of teacher 'a' is not the one that its shards were encoded"
    ):
        build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    assert (folder / "complete.json").read_bytes() == before


def test_adding_a_teacher_does_not_vouch_for_an_altered_record(folder):
    path = folder / "commits/a/0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "max_logit": record["max_logit"] + 1}, indent=2, sort_keys=True) + "\n")
    with pytest.raises(CorruptCacheError, match=r"teacher 'a' is no longer what complete\.json vouches for"):
        build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    assert not verify_cache(folder).is_sound


def test_an_unfinished_build_does_not_go_on_under_an_altered_document(folder):
    for name in ("complete.json", "commits/a/2.json", "teachers/a/codes/c/2/0"):
        (folder / name).unlink()
    alter_spacing(folder)
    with pytest.raises(CorruptCacheError, match="is not the one that its shards were encoded"):
        build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)


def test_a_repair_without_the_root_does_not_vouch_for_an_altered_document(folder):
    alter_spacing(folder)
    (folder / "zarr.json").unlink()
    repair_cache(folder)
    with pytest.raises((CorruptCacheError, kdcache.errors.IncompleteCacheError)):
        open_cache(folder).read([0])


def test_a_document_is_mended_from_the_copy_in_the_root(folder):
    whole = (folder / DOCUMENT).read_bytes()
    alter_spacing(folder)
    repair_cache(folder)
    assert (folder / DOCUMENT).read_bytes() == whole
    assert verify_cache(folder).is_sound


def test_records_of_a_later_release_are_no_damage(folder):
    before = {}
    for path in sorted((folder / "commits/a").iterdir()):
        path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}, indent=2, sort_keys=True) + "\n")
        before[path] = path.read_bytes()
    with pytest.raises(CorruptCacheError, match="have fields that this release does not know: a later one wrote them"):
        repair_cache(folder)
    assert {path: path.read_bytes() for path in before} == before
    assert (folder / "complete.json").exists()


def test_shards_that_were_away_for_a_moment_keep_their_records(folder, monkeypatch):
    codes, away = folder / "teachers/a/codes/c", folder / "teachers/a/away"
    codes.rename(away)
    verify = verify_cache

    def verify_and_mount(*arguments, **options):
        report = verify(*arguments, **options)
        away.rename(codes)
        return report

    monkeypatch.setattr("kdcache.repair.repairing.verify_cache", verify_and_mount)
    with pytest.raises(StoreError, match=r"that were missing a moment ago are there, such as teachers/a/codes/c/0/0"):
        repair_cache(folder, tiny_transfer_set(), tiny_teachers(1))
    assert verify(folder).is_sound


def test_a_folder_in_a_files_place_is_named(folder):
    (folder / "commits/a/0.json").unlink()
    (folder / "commits/a/0.json").mkdir()
    with pytest.raises(StoreError, match=r"commits/a/0\.json cannot be read: Is a directory"):
        open_cache(folder).read([0])
    with pytest.raises(StoreError, match=r"commits/a/0\.json cannot be read: Is a directory"):
        verify_cache(folder)


def test_a_failing_disk_is_named_with_its_file_and_is_no_damage(folder, monkeypatch):
    def failing(*_):
        raise OSError(5, os.strerror(5))

    cache = open_cache(folder)
    monkeypatch.setattr("kdcache.store.local_objects.os.preadv", failing)
    with pytest.raises(StoreError, match=r"index/entries/c/0/0 cannot be read: Input/output error"):
        cache.read([0])
