"""Codes that fill memory: each chunk once, those that are asked for first, and nothing readable that is not filled."""

import gc
import os
import threading
import time
import weakref

import numpy as np
import pytest
from store_builders import whole

from kdcache.errors import CorruptCacheError

SHARD = "teachers/a/codes/c/1/0"


@pytest.fixture
def decoded(written, monkeypatch):
    """Chunks that are decoded, by their numbers."""
    noted = []
    kind = type(written.reader())
    read_chunks = kind.read_chunks

    def note(self, chunk_indexes, out):
        noted.extend(chunk_indexes)
        read_chunks(self, chunk_indexes, out)

    monkeypatch.setattr(kind, "read_chunks", note)
    return noted


def wait_until_whole(resident):
    deadline = time.monotonic() + 30  # not the end of threads: those of codes that another test holds may be idle yet
    while not resident.is_whole and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident.is_whole


def test_rows_that_are_asked_for_are_there(written):
    resident = written.resident()
    rows = np.array([250, 3, 130])
    resident.fill(rows)
    np.testing.assert_array_equal(resident.codes[rows], written.codes[rows])


def test_the_chunks_that_are_asked_for_come_first(written, decoded):
    written.resident().fill(np.array([250]))
    assert decoded[0] == 7


def test_all_others_follow_by_themselves(written):
    resident = written.resident()
    resident.fill(np.array([250]))
    wait_until_whole(resident)
    np.testing.assert_array_equal(resident.codes[:300], written.codes)


def test_each_chunk_is_decoded_once(written, decoded):
    resident = written.resident()
    resident.fill(np.array([250, 0]))
    resident.fill(np.array([251, 100, 1]))
    wait_until_whole(resident)
    resident.fill_all()
    assert sorted(decoded) == list(range(12))


def test_the_whole_is_known_as_such_when_a_chunk_that_was_waited_for_comes_last(written, monkeypatch):
    kind = type(written.reader())
    read_chunks, released, begun, others = kind.read_chunks, threading.Event(), threading.Event(), []

    def slow_first(self, chunk_indexes, out):
        if chunk_indexes == [0]:
            begun.set()
            released.wait(30)
        else:
            others.extend(chunk_indexes)
        read_chunks(self, chunk_indexes, out)

    monkeypatch.setattr(kind, "read_chunks", slow_first)
    resident = written.resident()
    asking = threading.Thread(target=resident.fill, args=(np.array([0]),))
    asking.start()
    begun.wait(30)
    resident.fill(np.array([250]))
    deadline = time.monotonic() + 30
    while len(others) < 11 and time.monotonic() < deadline:
        time.sleep(0.01)
    released.set()
    asking.join()
    wait_until_whole(resident)


def test_threads_that_ask_at_once_get_right_rows(written):
    resident = written.resident()
    wrong = []

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, 300, 40)
        resident.fill(rows)
        if not np.array_equal(resident.codes[rows], written.codes[rows]):
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_rows_of_a_damaged_shard_are_an_error_whenever_they_are_asked_for(written):
    path = written.store.objects._path(SHARD)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    resident = written.resident()
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match="checksum of a chunk"):
            resident.fill(np.array([130]))


def test_rows_beside_a_damaged_shard_are_given(written):
    written.store.objects.delete(SHARD)
    resident = written.resident()
    resident.fill(np.array([5, 260]))
    np.testing.assert_array_equal(resident.codes[[5, 260]], written.codes[[5, 260]])


def test_codes_that_nobody_holds_are_given_back(written):
    resident = written.resident()
    resident.fill(np.array([5]))
    gone = weakref.ref(resident)
    wait_until_whole(resident)
    del resident
    gc.collect()
    assert gone() is None


def test_a_forked_process_fills_what_was_not_filled(written):
    resident = written.resident()
    resident._wait_for([0])
    child = os.fork()
    if child == 0:  # here nothing may be raised: the test runner's code would go on twice
        try:
            is_right = np.array_equal(whole(resident)[:300], written.codes)
        finally:
            os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_holding_all_beside_others_that_read_decodes_each_chunk_once(written, decoded):
    for _ in range(20):
        decoded.clear()
        resident = written.resident()
        readers = [threading.Thread(target=resident.fill, args=(np.array([row]),)) for row in (5, 100, 200)]
        for reader in readers:
            reader.start()
        resident.fill_all()
        for reader in readers:
            reader.join()
        wait_until_whole(resident)
        assert sorted(decoded) == list(range(12))


def test_rows_that_could_not_be_read_are_tried_again(written):
    path = written.store.objects._path(SHARD)
    data = path.read_bytes()
    path.unlink()
    resident = written.resident()
    with pytest.raises(CorruptCacheError, match="the shard is missing"):
        resident.fill(np.array([130]))
    path.write_bytes(data)
    resident.fill(np.array([130]))
    np.testing.assert_array_equal(resident.codes[130], written.codes[130])


def test_an_error_of_chunks_that_were_read_together_is_told_once(written, monkeypatch):
    monkeypatch.setattr(type(written.reader()), "is_far", True)
    path = written.store.objects._path(SHARD)
    data = path.read_bytes()
    path.unlink()
    resident = written.resident()
    monkeypatch.setattr(resident, "_fill_behind", lambda: None)
    rows = np.arange(128, 256)
    with pytest.raises(CorruptCacheError, match="the shard is missing"):
        resident.fill(rows)
    path.write_bytes(data)
    resident.fill(rows)
    np.testing.assert_array_equal(resident.codes[rows], written.codes[rows])
