import errno
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from kdcache.errors import KdcacheError, StoreError
from kdcache.store import LocalObjects, open_objects
from kdcache.store import local_objects as objects_module

KEY = "teachers/a/codes/c/0/0"


@pytest.fixture
def objects(tmp_path):
    return LocalObjects(tmp_path / "store")


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_published_object_reads_back(objects):
    assert objects.publish(KEY, b"first")
    assert objects.read(KEY) == b"first"


def test_publishing_twice_keeps_the_first_bytes_and_says_so(objects):
    objects.publish(KEY, b"first")
    assert not objects.publish(KEY, b"second")
    assert objects.read(KEY) == b"first"


def test_publishing_leaves_no_partial_file(objects, tmp_path):
    objects.publish(KEY, b"first")
    objects.publish(KEY, b"second")
    assert files_below(tmp_path / "store") == [KEY]


def test_of_many_threads_publishing_at_once_one_wins(objects):
    barrier = threading.Barrier(8)
    wins = []

    def publish(number):
        barrier.wait()
        if objects.publish(KEY, bytes([number]) * 1000):
            wins.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert objects.read(KEY) == bytes(wins) * 1000


def test_the_loser_of_a_race_after_its_check_still_loses(objects, monkeypatch):
    objects.publish(KEY, b"first")
    monkeypatch.setattr(objects_module.pathlib.Path, "exists", lambda _: False)
    assert not objects.publish(KEY, b"second")
    assert objects.read(KEY) == b"first"


def test_a_link_whose_answer_was_lost_counts_as_published(objects, monkeypatch):
    link = os.link

    def link_and_fail(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "the repeated request")

    monkeypatch.setattr(os, "link", link_and_fail)
    assert objects.publish(KEY, b"first")


@pytest.fixture
def no_hard_links(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_hard_links")
def test_without_hard_links_publishing_still_refuses_to_replace(objects, monkeypatch):
    assert objects.publish(KEY, b"first")
    monkeypatch.setattr(objects_module.pathlib.Path, "exists", lambda _: False)
    assert not objects.publish(KEY, b"second")
    assert objects.read(KEY) == b"first"


@pytest.mark.usefixtures("no_hard_links")
def test_without_any_way_to_refuse_nothing_is_published(objects, tmp_path, monkeypatch):
    class NoRename:
        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr(objects_module.ctypes, "CDLL", NoRename)
    with pytest.raises(KdcacheError, match="neither hard links nor a rename that refuses to replace"):
        objects.publish(KEY, b"first")
    assert files_below(tmp_path / "store") == []


def test_another_failure_of_linking_is_not_hidden(objects, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="no space left"):
        objects.publish(KEY, b"first")


def test_a_failed_write_leaves_nothing(objects, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "the disk failed")

    objects.publish("other", b"x")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk failed"):
        objects.publish("second", b"y")
    assert files_below(tmp_path / "store") == ["other"]


CHANGES = {
    "publish": (lambda objects: objects.publish(KEY, b"new"), "cannot be made durable: .* It stands whole", True),
    "replace": (lambda objects: objects.replace(KEY, b"new"), "cannot be made durable: .* It stands whole", True),
    "delete": (lambda objects: objects.delete("a/b"), "cannot be removed for good: .* It is gone", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_cannot_be_synced_behind_a_change_is_told_as_what_it_is(objects, monkeypatch, name):
    change, told, stands = CHANGES[name]
    objects.publish("a/b", b"old")
    objects.publish(f"{KEY}-beside", b"makes the folder")

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(objects_module, "_sync_folder", fail)
    with pytest.raises(StoreError, match=told) as caught:
        change(objects)
    assert caught.value.errno == errno.EIO
    assert (objects.size(KEY) is not None, objects.size("a/b") is not None) == (stands, stands)


def test_file_and_folder_are_synced_before_publish_returns(objects, tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(str(pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    objects.publish("a/b", b"x")
    root = str(tmp_path / "store")
    assert synced[:2] == [str(tmp_path), root]
    assert synced[2].startswith(f"{root}/a/.b.")
    assert synced[3:] == [f"{root}/a"]


def test_replace_puts_new_bytes_in_place_of_old(objects, tmp_path):
    objects.publish(KEY, b"first")
    objects.replace(KEY, b"second")
    assert objects.read(KEY) == b"second"
    assert files_below(tmp_path / "store") == [KEY]


def test_replace_works_where_nothing_stood(objects):
    objects.replace(KEY, b"first")
    assert objects.read(KEY) == b"first"


def test_delete_removes_an_object_and_says_whether_it_was_there(objects):
    objects.publish(KEY, b"first")
    assert objects.delete(KEY)
    assert not objects.delete(KEY)
    assert objects.size(KEY) is None


def test_size_is_that_of_the_object(objects):
    objects.publish(KEY, b"first")
    assert objects.size(KEY) == 5


def test_size_of_nothing_is_none(objects):
    assert objects.size(KEY) is None


def test_reading_nothing_is_a_file_not_found_error(objects):
    with pytest.raises(FileNotFoundError):
        objects.read(KEY)


def test_reading_a_range_of_nothing_is_a_file_not_found_error(objects):
    with pytest.raises(FileNotFoundError):
        objects.read_range(KEY, 0, 1)


@pytest.mark.parametrize(("start", "length", "expected"), [(0, 3, b"abc"), (2, 2, b"cd"), (4, 100, b"ef"), (9, 5, b"")])
def test_a_range_is_cut_where_the_object_ends(objects, start, length, expected):
    objects.publish(KEY, b"abcdef")
    assert objects.read_range(KEY, start, length) == expected


def test_a_huge_range_takes_no_more_memory_than_the_object(objects):
    objects.publish(KEY, b"abcdef")
    assert objects.read_range(KEY, 0, 2**60) == b"abcdef"


def test_list_gives_sorted_keys_below_a_folder(objects):
    for key in ("b/2", "b/1", "a", "b/c/3"):
        objects.publish(key, b"")
    assert list(objects.list("b")) == ["b/1", "b/2", "b/c/3"]
    assert list(objects.list("")) == ["a", "b/1", "b/2", "b/c/3"]


def test_list_of_nothing_is_empty(objects):
    assert list(objects.list("nothing")) == []


def test_a_stale_partial_file_is_never_listed(objects, tmp_path):
    objects.publish("commits/a/0.json", b"{}")
    (tmp_path / "store/commits/a/.1.json.17-abc.partial").write_bytes(b"{")
    assert list(objects.list("commits")) == ["commits/a/0.json"]


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b", ".a", "a/.b"]
)
def test_a_key_that_could_leave_the_root_or_hide_is_refused(objects, key):
    with pytest.raises(KdcacheError, match="is no key of a store"):
        objects.publish(key, b"x")


def test_a_local_path_opens_as_local_objects(tmp_path):
    assert open_objects(tmp_path).address == str(tmp_path)


def test_a_file_address_opens_as_local_objects(tmp_path):
    assert open_objects(f"file://{tmp_path}").address == str(tmp_path)


def test_a_file_address_may_name_this_machine(tmp_path):
    assert open_objects(f"file://localhost{tmp_path}/a").address == f"{tmp_path}/a"


@pytest.mark.parametrize("address", ["file://elsewhere/a", "file://a", "file://", "file://localhost"])
def test_a_file_address_of_another_machine_or_of_no_path_is_refused(address):
    with pytest.raises(StoreError, match=f"{address}: a file:// address is of this machine.*Give file:///PATH"):
        open_objects(address)


WRITER = """
import sys
from kdcache.store import LocalObjects
objects = LocalObjects(sys.argv[1])
print("started", flush=True)
for number in range(10**9):
    objects.publish(f"objects/{number}", bytes([number % 256]) * 1_000_000)
    objects.replace("latest", bytes([number % 256]) * 1_000_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
def test_a_writer_killed_at_any_time_leaves_only_whole_objects(objects, tmp_path, seconds):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.kill()
    contents = [objects.read(key) for key in objects.list("")]
    assert contents
    assert [len(data) for data in contents] == [1_000_000] * len(contents)
    assert all(data == data[:1] * 1_000_000 for data in contents)


def _publish_and_die(root):
    objects_module._link = lambda *_: os._exit(9)
    LocalObjects(root).publish(KEY, b"half")


def test_a_writer_killed_before_linking_leaves_nothing_that_reads(objects, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_publish_and_die, args=(str(tmp_path / "store"),))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(files_below(tmp_path / "store")) == 1
    assert list(objects.list("")) == []
    assert objects.publish(KEY, b"whole")
    assert objects.read(KEY) == b"whole"


OTHER_MACHINE = "00000000"
RANDOM = "0123456789abcdef"
DAY = 24 * 3600


@pytest.fixture
def ended_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def leave_partial(objects, *, machine, pid, age=0):
    path = pathlib.Path(objects.address) / "commits" / "a" / f".1.json.{machine}-{pid}-{RANDOM}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_partial_file_of_a_process_that_ended_is_removed(objects, ended_pid):
    path = leave_partial(objects, machine=objects_module.this_machine(), pid=ended_pid)
    assert objects.remove_stale_partials() == 1
    assert not path.exists()


@pytest.mark.parametrize("age", [0, DAY - 60])
def test_a_partial_file_of_a_living_process_stays(objects, age):
    path = leave_partial(objects, machine=objects_module.this_machine(), pid=os.getpid(), age=age)
    assert objects.remove_stale_partials() == 0
    assert path.exists()


@pytest.mark.parametrize("age", [0, DAY - 60])
def test_a_partial_file_of_another_machine_stays_though_no_such_process_lives_here(objects, ended_pid, age):
    path = leave_partial(objects, machine=OTHER_MACHINE, pid=ended_pid, age=age)
    assert objects.remove_stale_partials() == 0
    assert path.exists()


@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["of another process", "of this process"])
def test_a_partial_file_older_than_a_day_is_removed_whoever_wrote_it(objects, pid):
    path = leave_partial(objects, machine=OTHER_MACHINE, pid=pid, age=DAY + 60)
    assert objects.remove_stale_partials() == 1
    assert not path.exists()


def test_a_partial_file_of_another_user_stays(objects, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "another user's process")

    monkeypatch.setattr(os, "kill", refuse)
    path = leave_partial(objects, machine=objects_module.this_machine(), pid=1)
    assert objects.remove_stale_partials() == 0
    assert path.exists()


@pytest.mark.parametrize("name", ["download.partial", ".download.partial", ".x.17-abc.partial", "1.json", ".hidden"])
def test_files_that_no_publishing_wrote_stay_however_old(objects, name):
    objects.publish("commits/a/0.json", b"{}")
    path = pathlib.Path(objects.address) / "commits" / name
    path.write_bytes(b"x")
    os.utime(path, (0, 0))
    assert objects.remove_stale_partials() == 0
    assert path.exists()
    assert objects.read("commits/a/0.json") == b"{}"


def test_a_partial_file_that_its_writer_removes_meanwhile_is_no_error(objects, monkeypatch):
    leave_partial(objects, machine=OTHER_MACHINE, pid=1)
    monkeypatch.setattr(pathlib.Path, "lstat", lambda path: path.with_name("gone").stat())
    assert objects.remove_stale_partials() == 0


def test_where_nothing_was_written_nothing_is_stale(objects):
    assert objects.remove_stale_partials() == 0


def test_a_partial_file_being_written_is_known_as_its_living_writer_s(objects, monkeypatch):
    removed = []
    link = os.link

    def clean_and_link(source, target):
        removed.append(objects.remove_stale_partials())
        link(source, target)

    monkeypatch.setattr(os, "link", clean_and_link)
    assert objects.publish(KEY, b"first")
    assert removed == [0]


def test_what_a_killed_writer_left_is_removed(objects, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_publish_and_die, args=(str(tmp_path / "store"),))
    process.start()
    process.join()
    assert objects.remove_stale_partials() == 1
    assert files_below(tmp_path / "store") == []
