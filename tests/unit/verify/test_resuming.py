"""A verification that is stopped goes on where it was, and claims nothing that it has not looked at."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_caches import build_tiny, files_of

from kdcache import Codes, verify_cache
from kdcache.errors import OptionError

SHARD = "teachers/b/codes/c/0/0"


class Stop(Exception):  # noqa: N818 - it stands for a kill, not for an error
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming") / "cache"
    build_tiny(folder, codec=Codes())
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


@pytest.fixture
def stopped(folder, tmp_path):
    """The resume file of a run that had found all six shards sound, and stopped before it could say so."""

    def stop(done, total):
        if done == total:
            raise Stop

    with pytest.raises(Stop):
        verify_cache(folder, resume_file=tmp_path / "state", on_progress=stop)
    return tmp_path / "state"


def test_a_stopped_run_leaves_what_it_found_sound(stopped):
    assert len(stopped.read_text().splitlines()) == 7


def test_the_next_run_skips_those_shards_and_counts_them(folder, stopped):
    report = verify_cache(folder, resume_file=stopped)
    assert (report.is_sound, report.num_shards, report.num_skipped) == (True, 6, 6)


def test_a_run_that_came_to_its_end_takes_the_file_away(folder, stopped):
    verify_cache(folder, resume_file=stopped)
    assert not stopped.exists()


def test_a_shard_that_was_changed_since_is_read_again(folder, stopped):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[::-1])
    report = verify_cache(folder, resume_file=stopped)
    assert [(finding.teacher, finding.shard_index) for finding in report.findings] == [("b", 0)]
    assert report.num_skipped == 5


def test_a_shard_that_is_lost_is_found_though_it_had_been_sound(folder, stopped):
    (folder / SHARD).unlink()
    assert not verify_cache(folder, resume_file=stopped).is_sound


def test_a_shard_that_was_bad_is_looked_at_again(folder, tmp_path):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[::-1])

    def stop(done, total):
        if done == total:
            raise Stop

    with pytest.raises(Stop):
        verify_cache(folder, resume_file=tmp_path / "state", on_progress=stop)
    assert not verify_cache(folder, resume_file=tmp_path / "state").is_sound


def test_a_last_line_that_was_cut_short_is_not_believed(folder, stopped):
    stopped.write_text(stopped.read_text()[:-20])
    assert verify_cache(folder, resume_file=stopped).num_skipped == 5


def test_the_file_of_another_level_is_refused(folder, stopped):
    with pytest.raises(OptionError, match=r"is not of this verification.*Give another file, or delete it"):
        verify_cache(folder, level="deep", resume_file=stopped)


def test_the_file_of_another_cache_is_refused(built, stopped):
    with pytest.raises(OptionError, match="is not of this verification"):
        verify_cache(built, resume_file=stopped)


def test_a_file_that_is_no_resume_file_is_left_as_it_is(folder, tmp_path):
    mine = tmp_path / "thesis.txt"
    mine.write_text("words\n")
    with pytest.raises(OptionError, match="is not of this verification"):
        verify_cache(folder, resume_file=mine)
    assert mine.read_text() == "words\n"


def test_a_file_within_the_cache_is_refused(folder):
    before = files_of(folder)
    with pytest.raises(OptionError, match="would lie in the cache"):
        verify_cache(folder, resume_file=folder / "state")
    assert files_of(folder) == before


def test_a_quick_verification_has_nothing_to_resume(folder, tmp_path):
    with pytest.raises(OptionError, match="nothing to resume"):
        verify_cache(folder, level="quick", resume_file=tmp_path / "state")


def test_the_file_says_what_it_is_about(folder, stopped):
    header = json.loads(stopped.read_text().splitlines()[0])
    assert header == {"kdcache_verify": 1, "address": str(folder), "level": "digests"}
