"""Local copies: made once, whole or not at all, and never a wrong row out of an altered one."""

import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import CacheNotFoundError, CorruptCacheError, OptionError, StoreError
from kdcache.store import LocalCopy

DIGEST = "ab" * 32
ROWS = np.array([0, 299, 130])


class FailingReader:
    """A reader of codes whose rows cannot be read."""

    def __init__(self, reader, error):
        self.spec = reader.spec
        self.error = error

    def prepare(self):
        """Have nothing to do."""

    def read_chunks(self, *_, **__):
        raise self.error


@pytest.fixture
def copy_of(written, tmp_path):
    def make(reader=None, folder=tmp_path / "copies"):
        reader = reader or written.reader()
        return LocalCopy.of(folder, reader, data_digest=DIGEST, num_rows=written.cache_document.padded_rows)

    return make


def files(tmp_path):
    return {path.suffix: path for path in (tmp_path / "copies").iterdir()}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_copy_holds_all_rows(written, copy_of):
    copy = copy_of()
    copy.check(np.arange(300))
    np.testing.assert_array_equal(copy.codes[:300], written.codes)


def test_a_copy_is_made_once(written, copy_of):
    copy_of()
    written.store.objects.delete("teachers/a/codes/c/1/0")
    np.testing.assert_array_equal(copy_of().codes[ROWS], written.codes[ROWS])


def test_nothing_stays_beside_a_copy_but_its_sums_and_its_lock(copy_of, tmp_path):
    copy_of()
    assert sorted(files(tmp_path)) == [".codes", ".crc32c", ".lock"]


def test_a_flipped_bit_is_found_before_its_row_is_given(copy_of, tmp_path):
    copy_of()
    flip(files(tmp_path)[".codes"], 2000)
    with pytest.raises(CorruptCacheError, match=r"rows from 0 on were altered.*The cache itself is untouched. Delete"):
        copy_of().check(ROWS)


def test_altered_sums_are_found(copy_of, tmp_path):
    copy_of()
    flip(files(tmp_path)[".crc32c"], 1)
    with pytest.raises(CorruptCacheError, match="crc32c was altered"):
        copy_of()


def test_missing_sums_are_found(copy_of, tmp_path):
    copy_of()
    files(tmp_path)[".crc32c"].unlink()
    with pytest.raises(CorruptCacheError, match="crc32c is missing"):
        copy_of()


def test_a_torn_copy_is_found(copy_of, tmp_path):
    copy_of()
    path = files(tmp_path)[".codes"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match="it has 4223 bytes where the rows take 4224"):
        copy_of()


def test_a_damaged_shard_leaves_no_copy(written, copy_of, tmp_path):
    written.store.objects.delete("teachers/a/codes/c/1/0")
    with pytest.raises(CorruptCacheError, match="the shard is missing"):
        copy_of()
    assert sorted(files(tmp_path)) == [".lock"]


def test_a_copy_that_was_not_finished_is_made_anew(written, copy_of, tmp_path):
    folder = tmp_path / "copies"
    folder.mkdir()
    (folder / f"{DIGEST[:32]}.partial").write_bytes(b"half")
    np.testing.assert_array_equal(copy_of().codes[ROWS], written.codes[ROWS])


def test_a_folder_that_cannot_be_made_is_refused(copy_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"could not be made.*the cache is untouched. Name another folder"):
        copy_of(folder=tmp_path / "file" / "copies")


@pytest.mark.parametrize("error", [StoreError("no room for pages"), CacheNotFoundError("gone"), OptionError("wrong")])
def test_what_kdcache_says_while_a_copy_is_made_is_passed_on(written, copy_of, error):
    with pytest.raises(type(error)) as raised:
        copy_of(FailingReader(written.reader(), error))
    assert raised.value is error


def test_what_the_system_says_while_a_copy_is_made_is_put_in_its_place(written, copy_of):
    with pytest.raises(StoreError, match=r"could not be made \(no room\).*Name another folder"):
        copy_of(FailingReader(written.reader(), OSError("no room")))


def test_a_system_without_file_locks_is_refused(copy_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(StoreError, match="tier 'mapped' needs a POSIX system"):
        copy_of()


def test_changes_of_what_was_mapped_do_not_reach_the_file(written, copy_of):
    copy_of().codes[0] = 9
    np.testing.assert_array_equal(copy_of().codes[0], written.codes[0])


def open_there(folder, reader, num_rows, answers):
    copy = LocalCopy.of(folder, reader, data_digest=DIGEST, num_rows=num_rows)
    answers.put(copy.codes[ROWS].tobytes())


def test_processes_that_want_a_copy_at_once_get_the_same(written, tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    options = (tmp_path / "copies", written.reader(), written.cache_document.padded_rows, answers)
    processes = [context.Process(target=open_there, args=options) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {written.codes[ROWS].tobytes()}
