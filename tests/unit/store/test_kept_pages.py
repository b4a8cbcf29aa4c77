"""Pages kept locally: each fetched once, bounded, dropped by age, and never a wrong byte."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import OptionError, StoreError
from kdcache.store import KeptPages, LocalObjects
from kdcache.store.kept_pages import PAGE_BYTES

KEY = "teachers/a/codes/c/0/0"
DATA = np.random.default_rng(0).integers(0, 256, 3 * PAGE_BYTES + 1000, dtype=np.uint8).tobytes()
MOST = 16 * PAGE_BYTES


class FarObjects(LocalObjects):
    """Objects that note what is asked of them."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = []

    def read_range(self, key, start, length):
        self.asked.append((key, start, length))
        return super().read_range(key, start, length)


@pytest.fixture
def far(tmp_path):
    objects = FarObjects(tmp_path / "far")
    objects.publish(KEY, DATA)
    return objects


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "near"


@pytest.fixture
def near(far, folder):
    return KeptPages(far, folder, identity="one", max_bytes=MOST)


def pages(folder) -> list[Path]:
    return sorted(folder.glob("*/*.page"), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 10), (PAGE_BYTES - 5, 10), (5, 2 * PAGE_BYTES), (3 * PAGE_BYTES, 1000), (0, len(DATA)), (len(DATA) - 3, 99)],
)
def test_any_range_comes_as_it_is(near, start, length):
    assert near.read_range(KEY, start, length) == DATA[start : start + length]


def test_what_was_read_is_not_fetched_again(near, far):
    near.read_range(KEY, 10, PAGE_BYTES)
    near.read_range(KEY, 2000, PAGE_BYTES - 2000)
    assert far.asked == [(KEY, 0, 2 * PAGE_BYTES)]


def test_what_was_kept_serves_another_process_and_another_day(near, far, folder):
    near.read_range(KEY, 0, len(DATA))
    far.delete(KEY)
    again = KeptPages(far, folder, identity="one", max_bytes=MOST)
    assert again.read_range(KEY, 0, len(DATA)) == DATA


def test_another_cache_at_the_same_address_gets_nothing_of_this_one(near, far, folder):
    near.read_range(KEY, 0, 10)
    far.replace(KEY, b"another")
    assert KeptPages(far, folder, identity="two", max_bytes=MOST).read_range(KEY, 0, 7) == b"another"


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_page_that_was_altered_is_fetched_again(near, far, folder, place):
    near.read_range(KEY, 0, 10)
    (page,) = pages(folder)
    data = bytearray(page.read_bytes())
    data[place] ^= 1
    page.write_bytes(data)
    assert near.read_range(KEY, 0, PAGE_BYTES) == DATA[:PAGE_BYTES]
    assert len(far.asked) == 2


def test_a_page_that_was_torn_is_fetched_again(near, folder):
    near.read_range(KEY, 0, 10)
    (page,) = pages(folder)
    page.write_bytes(page.read_bytes()[:1000])
    assert near.read_range(KEY, 0, PAGE_BYTES) == DATA[:PAGE_BYTES]


def test_the_folder_takes_no_more_than_allowed(far, near, folder):
    for number in range(30):
        far.publish(f"large/{number}", DATA)
        near.read_range(f"large/{number}", 0, PAGE_BYTES)
        assert sum(path.stat().st_size for path in pages(folder)) <= MOST


def test_what_was_used_longest_ago_is_dropped(far, near, folder):
    for number in range(15):
        far.publish(f"large/{number}", DATA)
        near.read_range(f"large/{number}", 0, PAGE_BYTES)
        os.utime(pages(folder)[-1], (number, number))
    near.read_range("large/0", 0, 10)
    for number in range(15, 18):
        far.publish(f"large/{number}", DATA)
        near.read_range(f"large/{number}", 0, PAGE_BYTES)
    far.asked.clear()
    near.read_range("large/0", 0, 10)
    near.read_range("large/1", 0, 10)
    assert far.asked == [("large/1", 0, PAGE_BYTES)]


def test_an_object_that_is_not_there_is_missing(near):
    with pytest.raises(FileNotFoundError):
        near.read_range("large/none", 0, 10)


def test_a_folder_that_cannot_be_written_to_is_an_error(far, tmp_path):
    (tmp_path / "file").write_text("")
    near = KeptPages(far, tmp_path / "file", identity="one", max_bytes=MOST)
    with pytest.raises(StoreError, match=r"could not be written.*open the cache without a local one"):
        near.read_range(KEY, 0, 10)


def test_too_little_room_is_refused(far, folder):
    with pytest.raises(OptionError, match="holds too little; give at least 16777216"):
        KeptPages(far, folder, identity="one", max_bytes=MOST - 1)


def test_threads_may_read_at_once(near):
    wrong = []

    def read(seed):
        starts = np.random.default_rng(seed).integers(0, len(DATA), 20).tolist()
        wrong.extend(start for start in starts if near.read_range(KEY, start, 5000) != DATA[start : start + 5000])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
