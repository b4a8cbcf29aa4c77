"""Pages kept locally: each fetched once, bounded, dropped by age, and never a wrong byte."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import OptionError, StoreError
from kdcache.store import KeptPages, LocalObjects
from kdcache.store.kept_pages import PAGE_BYTES

KEY = "teachers/a/codes/c/0/0"
DATA = np.random.default_rng(0).integers(0, 256, 3 * PAGE_BYTES + 1000, dtype=np.uint8).tobytes()
MOST = 16 * PAGE_BYTES
MANY_PAGES = bytes(20 * PAGE_BYTES)


class FarObjects(LocalObjects):
    """Objects that note what is asked of them."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = []

    def read_sized(self, key, start, length, *, believed_bytes):
        self.asked.append((key, start, length))
        return super().read_sized(key, start, length, believed_bytes=believed_bytes)


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


class SlowlyCounted(KeptPages):
    """Pages whose folder is counted no further until it is allowed."""

    has_begun = threading.Event()
    may_go_on = threading.Event()

    def _dropped(self):
        self.has_begun.set()
        self.may_go_on.wait(60)
        return super()._dropped()


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
    far.asked.clear()
    again = KeptPages(far, folder, identity="one", max_bytes=MOST)
    assert again.read_range(KEY, 0, len(DATA)) == DATA
    assert far.asked == []


def test_what_was_kept_serves_when_the_object_is_there_no_more(near, far):
    near.read_range(KEY, 0, 10)
    far.delete(KEY)
    assert near.read_range(KEY, 5, 10) == DATA[5:15]
    with pytest.raises(FileNotFoundError):
        near.read_range(KEY, PAGE_BYTES, 10)


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


def test_a_folder_that_cannot_be_made_is_an_error_at_once(far, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"could not be made.*open the cache without a local one"):
        KeptPages(far, tmp_path / "file", identity="one", max_bytes=MOST)


def test_a_page_that_cannot_be_written_is_given_and_warned_of_once(near, folder):
    folder.rmdir()
    folder.write_text("")
    with pytest.warns(RuntimeWarning, match=rf"{folder} could not be written to \(.*Not a directory") as warned:
        found = near.read_range(KEY, 0, len(DATA))
    assert found == DATA
    assert len(warned) == 1
    assert near.read_range(KEY, 0, 10) == DATA[:10]


def test_a_page_that_cannot_take_its_place_is_given_and_warned_of(near, folder):
    near.read_range(KEY, 0, 10)
    (page,) = pages(folder)
    page.unlink()
    (page / "folder").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="could not be written to"):
        found = near.read_range(KEY, 0, 10)
    assert found == DATA[:10]


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


def test_what_was_kept_of_an_object_half_copied_does_not_serve_when_it_is_whole(far, folder):
    far.replace(KEY, DATA[: PAGE_BYTES // 2])
    KeptPages(far, folder, identity="one", max_bytes=MOST).read_range(KEY, 0, PAGE_BYTES)
    far.replace(KEY, DATA)
    again = KeptPages(far, folder, identity="one", max_bytes=MOST)
    assert again.read_range(KEY, 0, PAGE_BYTES) == DATA[:PAGE_BYTES]


def test_an_object_that_shrank_is_read_short_and_nothing_of_it_is_kept(near, far, folder):
    near.read_range(KEY, 0, 10)
    far.replace(KEY, DATA[: PAGE_BYTES + 5])
    assert near.read_range(KEY, PAGE_BYTES, 2000) == DATA[PAGE_BYTES : PAGE_BYTES + 5]
    assert len(pages(folder)) == 1


def test_what_was_forgotten_is_fetched_anew(near, far):
    far.replace(KEY, bytes(len(DATA)))
    near.read_range(KEY, 0, PAGE_BYTES + 1)
    far.replace(KEY, DATA)
    assert near.forget(KEY) == 2
    assert near.read_range(KEY, 0, len(DATA)) == DATA


def test_an_object_that_grew_is_read_whole_once_it_was_forgotten(near, far):
    far.replace(KEY, DATA[:1000])
    near.read_range(KEY, 0, PAGE_BYTES)
    far.replace(KEY, DATA)
    assert near.forget(KEY) == 1
    assert near.read_range(KEY, 0, len(DATA)) == DATA


def test_forgetting_one_object_leaves_the_others(near, far, folder):
    far.publish("large/0", DATA)
    near.read_range(KEY, 0, 10)
    near.read_range("large/0", 0, 10)
    assert near.forget("large/0") == 1
    assert near.forget("large/none") == 0
    assert len(pages(folder)) == 1


def test_two_that_share_a_folder_take_no_more_than_one_may(near, far, folder):
    other = KeptPages(far, folder, identity="one", max_bytes=MOST)
    for number in range(30):
        far.publish(f"large/{number}", DATA)
        (near, other)[number % 2].read_range(f"large/{number}", 0, PAGE_BYTES)
        assert sum(path.stat().st_size for path in pages(folder)) <= MOST


def test_nobody_waits_while_the_folder_is_counted(far, folder):
    near = SlowlyCounted(far, folder, identity="one", max_bytes=MOST)
    first = threading.Thread(target=near.read_range, args=(KEY, 0, 10), daemon=True)
    second = threading.Thread(target=near.read_range, args=(KEY, PAGE_BYTES, 10), daemon=True)
    first.start()
    assert near.has_begun.wait(60)
    second.start()
    second.join(10)
    has_waited = second.is_alive()
    near.may_go_on.set()
    first.join()
    assert not has_waited


def test_partial_files_are_dropped_when_they_are_older_than_an_hour(near, folder):
    left, at_work = (folder / "ab" / f"ab.page.{name}.partial" for name in ("1-2", "3-4"))
    left.parent.mkdir()
    left.write_bytes(b"half")
    at_work.write_bytes(b"half")
    os.utime(left, (time.time() - 3700,) * 2)
    near.read_range(KEY, 0, 10)
    assert [left.exists(), at_work.exists()] == [False, True]


@pytest.mark.parametrize("key", [KEY, "index/entries/c/0"])
def test_whole_shards_and_parts_of_the_index_are_kept(near, far, key):
    far.replace(key, DATA)
    assert near.read(key) == DATA
    far.replace(key, bytes(len(DATA)))
    assert near.read(key) == DATA


@pytest.mark.parametrize("key", ["complete.json", "teachers/a/zarr.json", "index/zarr.json", "teachers/zarr.json"])
def test_documents_are_read_where_they_are(near, far, folder, key):
    far.publish(key, b"one")
    near.read(key)
    far.replace(key, b"two")
    assert near.read(key) == b"two"
    assert pages(folder) == []


def test_a_whole_object_that_is_not_there_is_missing(near):
    with pytest.raises(FileNotFoundError, match="teachers/none/codes/c/0/0"):
        near.read("teachers/none/codes/c/0/0")


def test_neighbouring_pages_of_all_ranges_are_fetched_together(near, far):
    near.read_range(KEY, 2 * PAGE_BYTES, 10)
    far.asked.clear()
    ranges = [(5, 10), (PAGE_BYTES + 5, 10), (2 * PAGE_BYTES, 10), (len(DATA) - 10, 20)]
    assert list(near.read_ranges(KEY, ranges)) == [DATA[start : start + length] for start, length in ranges]
    assert far.asked == [(KEY, 0, 2 * PAGE_BYTES), (KEY, 3 * PAGE_BYTES, 1000)]


def test_one_request_asks_for_sixteen_pages_at_most(near, far):
    far.publish("large/0", MANY_PAGES)
    near.read_range("large/0", 0, len(MANY_PAGES))
    assert far.asked == [("large/0", 0, 16 * PAGE_BYTES), ("large/0", 16 * PAGE_BYTES, 4 * PAGE_BYTES)]


def test_neighbouring_ranges_read_their_page_once(near, folder):
    near.read_range(KEY, 0, 10)
    found = near.read_ranges(KEY, [(0, 10), (10, 10)])
    assert next(found) == DATA[:10]
    (page,) = pages(folder)
    os.utime(page, (0, 0))
    assert next(found) == DATA[10:20]
    assert page.stat().st_mtime == 0


def test_ranges_may_descend(near):
    ranges = [(3 * PAGE_BYTES, 10), (PAGE_BYTES - 5, 10), (0, 10)]
    assert list(near.read_ranges(KEY, ranges)) == [DATA[start : start + length] for start, length in ranges]
