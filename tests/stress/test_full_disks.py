"""Disks that are full, quotas, folders that may not be written: a named error, nothing half-written, and going on."""

from __future__ import annotations

import errno
import os
import resource
import signal
import traceback

import pytest
from tiny_caches import build_tiny, files_of

import kdcache
from kdcache.errors import IncompleteCacheError, StoreError
from kdcache.store import LocalObjects

NOBODY = 65_534
SIZES = [0, 300, 700, 1_000, 1_500, 2_500, 4_000]
"""Bytes a file may have: from nothing at all to all but the largest."""


def in_a_child(work) -> str:
    """Run something in a forked process, whose limits and rights end with it; gives what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.write(write, str(work()).encode())
        except BaseException:  # noqa: BLE001 - told to the parent, which must not run on twice
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


def refusal_of(folder) -> str:
    try:
        build_tiny(folder)
    except StoreError as error:
        return f"StoreError {error.errno} {error}"
    return "built"


@pytest.mark.parametrize("size", SIZES)
def test_a_build_that_meets_a_limit_says_which_file_and_leaves_none_half_written(tmp_path, size):
    whole = build_tiny(tmp_path / "whole")
    address = tmp_path / "cache"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return refusal_of(address)

    told = in_a_child(limited)
    assert told.startswith(f"StoreError {errno.EFBIG} {address}/")
    assert "cannot be written: File too large. Nothing of it can be read in part" in told
    root = {"zarr.json"}  # replaced at the end of a build
    expected, found = files_of(tmp_path / "whole"), files_of(address)
    assert {name: found[name] for name in found.keys() - root} == {name: expected[name] for name in found.keys() - root}
    with pytest.raises((IncompleteCacheError, FileNotFoundError)):
        kdcache.open_cache(address)
    assert build_tiny(address).complete.data_digest == whole.complete.data_digest


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    address = tmp_path / "cache"
    address.mkdir()

    def without_rights():
        os.chdir(address)  # the folders above are nobody's business
        os.setuid(NOBODY)
        return refusal_of("cache")

    told = in_a_child(without_rights)
    assert told.startswith(f"StoreError {errno.EACCES} cache")
    assert "Have the folder's owner allow it, or give another address" in told
    assert files_of(address) == {}


def test_a_full_disk_is_told_apart_from_damage_and_the_build_goes_on_later(tmp_path, monkeypatch):
    whole = build_tiny(tmp_path / "whole")
    write, written = os.write, []

    def full(descriptor, content):
        written.append(len(content))
        if len(written) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.local_objects.os.write", full)
        with pytest.raises(StoreError, match=r"No space left on device\. Nothing of it can be read in part") as caught:
            build_tiny(tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    assert build_tiny(tmp_path / "cache").complete.data_digest == whole.complete.data_digest


def test_a_file_in_a_folders_place_is_named(tmp_path):
    (tmp_path / "teachers").write_text("not a folder")
    with pytest.raises(StoreError, match=r"teachers/a/codes/c/0/0 cannot be written: .* A file stands where a folder"):
        LocalObjects(tmp_path).publish("teachers/a/codes/c/0/0", b"bytes")


def test_a_clock_that_jumps_takes_no_living_writers_file(tmp_path, monkeypatch):
    """Partial files of this machine go by whether their writer lives, whatever the clock says."""
    objects = LocalObjects(tmp_path)
    with objects._partial(tmp_path / "object", b"bytes") as partial:
        os.utime(partial, (0, 0))
        monkeypatch.setattr("time.time", lambda: 0.0)
        assert objects.remove_stale_partials() == 0
        assert partial.exists()
