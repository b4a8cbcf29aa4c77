"""One suite for every place that keeps objects: a local folder, and each object store that runs on this machine."""

from __future__ import annotations

import os
import pickle
import threading

import pytest
from faulty_proxy import proxy_before
from object_servers import SERVERS

from kdcache.errors import OptionError
from kdcache.store import Objects, open_objects
from kdcache.store.limits import TooLargeError

KEY = "teachers/a/codes/c/0/0"


@pytest.fixture(params=["folder", *SERVERS])
def address(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("bucket_of")(request.param)


@pytest.fixture
def objects(address):
    return open_objects(address)


def test_it_is_a_place_of_objects(objects, address):
    assert isinstance(objects, Objects)
    assert objects.address == address


def test_a_published_object_reads_back(objects):
    assert objects.publish(KEY, b"first")
    assert objects.read(KEY) == b"first"


def test_an_empty_object_reads_back(objects):
    assert objects.publish(KEY, b"")
    assert objects.read(KEY) == b""
    assert objects.read_range(KEY, 0, 5) == b""


@pytest.mark.parametrize("second", [b"second", b"first"], ids=["other bytes", "equal bytes"])
def test_publishing_twice_keeps_the_first_bytes_and_says_so(objects, address, second):
    objects.publish(KEY, b"first")
    assert not objects.publish(KEY, second)
    assert not open_objects(address).publish(KEY, second)
    assert objects.read(KEY) == b"first"


def test_of_many_threads_publishing_at_once_one_wins(objects):
    wins = won_by(8, objects, KEY)
    assert len(wins) == 1
    assert objects.read(KEY) == content_of(wins[0])


@pytest.mark.slow
def test_of_many_threads_publishing_at_once_one_wins_every_time(objects):
    keys = [f"objects/{number}" for number in range(25)]
    wins = [won_by(4, objects, key) for key in keys]
    assert [len(won) for won in wins] == [1] * len(keys)
    assert [objects.read(key) for key in keys] == [content_of(won[0]) for won in wins]


def content_of(number):
    return bytes([number]) * 100_000


def won_by(count, objects, key):
    """Let threads publish at once, each through a connection of its own; gives the numbers of those that won."""
    barrier = threading.Barrier(count)
    wins = []

    def publish(number):
        own = pickle.loads(pickle.dumps(objects))  # noqa: S301 - our own
        barrier.wait()
        if own.publish(key, content_of(number)):
            wins.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wins


def test_what_publishing_needs_besides_is_never_listed(objects):
    objects.publish(KEY, b"first")
    objects.publish(KEY, b"second")
    assert list(objects.list("")) == [KEY]


def test_replace_puts_new_bytes_in_place_of_old(objects):
    objects.publish(KEY, b"first")
    objects.size(KEY)
    objects.replace(KEY, b"the second")
    assert objects.read(KEY) == b"the second"
    assert objects.size(KEY) == 10


def test_replace_works_where_nothing_stood(objects):
    objects.replace(KEY, b"first")
    assert objects.read(KEY) == b"first"


def test_delete_removes_an_object_and_says_whether_it_was_there(objects):
    objects.publish(KEY, b"first")
    assert objects.delete(KEY)
    assert not objects.delete(KEY)
    assert objects.size(KEY) is None


def test_a_deleted_object_can_be_published_anew(objects):
    objects.publish(KEY, b"first")
    objects.delete(KEY)
    assert objects.publish(KEY, b"second")
    assert objects.read(KEY) == b"second"


def test_an_object_that_has_more_bytes_than_are_wanted_is_refused(objects):
    objects.publish(KEY, b"first")
    assert objects.read(KEY, max_bytes=5) == b"first"
    with pytest.raises(TooLargeError) as caught:
        objects.read(KEY, max_bytes=4)
    assert caught.value.num_bytes == 5


@pytest.mark.parametrize("believed_bytes", [6, 5, 8, 200], ids=["right", "too few", "too many", "far too many"])
@pytest.mark.parametrize(("start", "length"), [(0, 3), (4, 2), (2, 4), (0, 6), (5, 2), (7, 1), (100, 100), (3, 0)])
def test_a_range_comes_with_the_size_of_its_object_whatever_it_was_believed_to_be(
    objects, start, length, believed_bytes
):
    objects.publish(KEY, b"abcdef")
    found = objects.read_sized(KEY, start, length, believed_bytes=believed_bytes)
    assert found == (b"abcdef"[start : start + length], 6)


def test_a_range_of_nothing_has_no_size(objects):
    with pytest.raises(FileNotFoundError):
        objects.read_sized(KEY, 2, 3, believed_bytes=6)


def test_size_is_that_of_the_object(objects):
    objects.publish(KEY, b"first")
    assert objects.size(KEY) == 5


def test_size_of_nothing_is_none(objects):
    assert objects.size(KEY) is None


def test_reading_nothing_is_a_file_not_found_error_that_names_the_key(objects):
    with pytest.raises(FileNotFoundError, match=KEY):
        objects.read(KEY)


@pytest.mark.parametrize("length", [0, 1])
def test_reading_a_range_of_nothing_is_a_file_not_found_error(objects, length):
    with pytest.raises(FileNotFoundError):
        objects.read_range(KEY, 0, length)


@pytest.mark.parametrize("is_known", [False, True], ids=["size unknown", "size known"])
@pytest.mark.parametrize(("start", "length", "expected"), [(0, 3, b"abc"), (2, 2, b"cd"), (4, 100, b"ef"), (9, 5, b"")])
def test_a_range_is_cut_where_the_object_ends(objects, start, length, expected, is_known):
    objects.publish(KEY, b"abcdef")
    assert not is_known or objects.size(KEY) == 6
    assert objects.read_range(KEY, start, length) == expected


def test_a_huge_range_takes_no_more_memory_than_the_object(objects):
    objects.publish(KEY, b"abcdef")
    assert objects.read_range(KEY, 0, 2**60) == b"abcdef"


def test_ranges_stay_those_of_their_object_while_another_is_read(objects):
    content, other = bytes(range(250)), bytes(250)
    objects.publish(KEY, content)
    objects.publish(f"{KEY}-other", other)
    ranges = objects.read_ranges(KEY, [(0, 100), (100, 100)])
    assert bytes(next(ranges)) == content[:100]
    assert bytes(next(objects.read_ranges(f"{KEY}-other", [(0, 200)]))) == other[:200]
    assert bytes(next(ranges)) == content[100:200]


def test_ranges_come_in_the_order_asked_for(objects):
    content = os.urandom(5_000_000)
    objects.publish(KEY, content)
    ranges = [(4_000_000, 100), (0, 10), (2_500_000, 700_000), (10, 0), (4_999_990, 50), (5, 10)]
    expected = [content[start : start + length] for start, length in ranges]
    assert [bytes(part) for part in objects.read_ranges(KEY, ranges)] == expected


@pytest.mark.parametrize("other", [b"ab", b"a longer object"], ids=["shorter", "longer"])
def test_a_range_of_an_object_that_was_replaced_elsewhere_is_of_the_new_one(objects, address, other):
    objects.publish(KEY, b"abcdef")
    objects.size(KEY)
    open_objects(address).replace(KEY, other)
    assert objects.read_range(KEY, 0, 6) == other[:6]
    assert objects.read_range(KEY, 1, 100) == other[1:]


def test_a_range_of_an_object_that_was_deleted_elsewhere_is_a_file_not_found_error(objects, address):
    objects.publish(KEY, b"abcdef")
    objects.size(KEY)
    open_objects(address).delete(KEY)
    with pytest.raises(FileNotFoundError):
        objects.read_range(KEY, 0, 3)


def test_list_gives_keys_below_a_folder_sorted_by_path_component(objects):
    for key in ("b-2", "b/2", "b/1", "a", "b/c/3", "bc/1"):
        objects.publish(key, b"x")
    assert list(objects.list("b")) == ["b/1", "b/2", "b/c/3"]
    assert list(objects.list("")) == ["a", "b/1", "b/2", "b/c/3", "b-2", "bc/1"]


def test_sizes_are_those_of_all_objects_below_a_folder(objects):
    for number in range(3):
        objects.publish(f"b/{number}/0", bytes(number))
    objects.publish("a", b"x")
    assert objects.sizes("b") == {"b/0/0": 0, "b/1/0": 1, "b/2/0": 2}
    assert set(objects.sizes("")) == {"a", "b/0/0", "b/1/0", "b/2/0"}
    assert objects.sizes("nothing") == {}


def test_an_address_is_empty_until_something_stands_there_that_is_not_hidden(objects):
    assert objects.is_empty()
    objects.publish(KEY, b"first")
    assert not objects.is_empty()
    objects.delete(KEY)
    assert objects.is_empty()


def test_list_of_nothing_is_empty(objects):
    assert list(objects.list("nothing")) == []


MANY = [f"many/{number:04}" for number in range(1100)]


def replace_all(objects, keys):
    for key in keys:
        objects.replace(key, b"x")


def test_list_gives_more_keys_than_a_server_tells_at_once(bucket_of):
    objects = open_objects(bucket_of("localbucket"))
    replace_all(objects, MANY)
    assert list(objects.list("many")) == MANY


def test_whether_an_address_is_empty_takes_one_page_of_a_list(server_of, bucket_of, monkeypatch):
    address = bucket_of("localbucket")
    replace_all(open_objects(address), MANY)
    with proxy_before(server_of("localbucket").endpoint) as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert not open_objects(address).is_empty()
        assert faults.seen == ["GET"]


@pytest.mark.slow
def test_list_gives_more_keys_than_any_server_tells_at_once(objects):
    replace_all(objects, MANY)
    assert list(objects.list("many")) == MANY


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b", ".a", "a/.b"]
)
def test_a_key_that_could_leave_the_root_or_hide_is_refused(objects, key):
    with pytest.raises(OptionError, match="is no key of a store"):
        objects.publish(key, b"x")
    with pytest.raises(OptionError, match="is no key of a store"):
        objects.read(key)


def test_in_another_process_it_opens_anew_by_its_address(objects):
    objects.publish(KEY, b"first")
    again = pickle.loads(pickle.dumps(objects))  # noqa: S301 - our own
    assert again.address == objects.address
    assert again.read(KEY) == b"first"


def test_forgetting_changes_nothing(objects):
    objects.publish(KEY, b"first")
    assert objects.forget(KEY) == 0
    assert objects.read(KEY) == b"first"
