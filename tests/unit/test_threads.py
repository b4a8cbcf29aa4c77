"""A loop's threads are left wherever Python ends the loop, and nothing stands still."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from kdcache.threads import LoopThreads

LOOP = """
import gc, itertools, os, signal, sys, threading, time
import kdcache.threads
kdcache.threads.SECONDS_TO_LEAVE = 1000.0

def loop(work):
    threads = kdcache.threads.LoopThreads(1, "loop")
    try:
        for step in itertools.count():
            threads.submit(work, step)
            yield step
    finally:
        threads.leave()
        print("left", flush=True)

def abandoned(work):
    left = [loop(work)]  # which only the garbage collector can end
    left.append(left)
    next(left[0])

gc.disable()
"""

WITHIN_THE_START_OF_A_THREAD = """
class Collecting(set):  # where Python 3.11 holds a lock that the end of every thread needs
    def add(self, lock):
        gc.collect()
        super().add(lock)

abandoned(lambda step: time.sleep(0.3))
threading._shutdown_locks = Collecting(threading._shutdown_locks)
kdcache.threads.LoopThreads(1, "other").submit(int).result(20)
"""

IN_ITS_OWN_THREAD = """
abandoned(lambda step: (time.sleep(0.2), gc.collect()))
time.sleep(0.1)
"""

IN_A_FORKED_PROCESS = """
may_end = threading.Event()
abandoned(lambda step: may_end.wait(20))
time.sleep(0.1)
pid = os.fork()
if not pid:
    signal.alarm(15)
    gc.collect()
    os._exit(0)
_, status = os.waitpid(pid, 0)
may_end.set()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(
    "where", [WITHIN_THE_START_OF_A_THREAD, IN_ITS_OWN_THREAD, IN_A_FORKED_PROCESS],
    ids=["within the start of a thread", "in its own thread", "in a forked process"],
)  # fmt: skip
def test_a_loop_that_the_garbage_collector_ends_does_not_stand_still(where):
    if where is WITHIN_THE_START_OF_A_THREAD and not hasattr(threading, "_shutdown_locks"):
        pytest.skip("this Python starts threads without that lock")
    program = [sys.executable, "-c", LOOP + where]
    ended = subprocess.run(program, check=True, timeout=60, capture_output=True, text=True)
    assert set(ended.stdout.split()) == {"left"}
    assert not ended.stderr  # where an error of what the collector runs would stand


def test_threads_end_with_their_loop():
    threads = LoopThreads(2, "a-loop-of-this-test")
    for _ in range(4):
        threads.submit(time.sleep, 0.01)
    threads.leave()
    for thread in threading.enumerate():
        if thread.name.startswith("a-loop-of-this-test"):
            thread.join(30)
            assert not thread.is_alive()


class Held:
    """What a thread is at until it may end."""

    def __init__(self) -> None:
        self.has_begun, self.may_end, self.done = threading.Event(), threading.Event(), []

    def __call__(self, step):
        self.has_begun.set()
        while not self.may_end.is_set():
            time.sleep(0.001)
        self.done.append(step)


def test_what_is_under_way_is_waited_for_and_what_has_not_begun_is_not_done(monkeypatch):
    held, released = Held(), []
    threads = LoopThreads(1, "test")
    asked = [threads.submit(held, step) for step in range(3)]
    assert held.has_begun.wait(30)
    wait = threads._is_idle.wait
    monkeypatch.setattr(threads._is_idle, "wait", lambda timeout: (held.may_end.set(), wait(timeout)))
    threads.leave(lambda: released.append(list(held.done)))
    assert released == [[0]]
    assert [future.cancelled() for future in asked] == [False, True, True]
    assert held.done == [0]


def test_what_takes_too_long_is_released_when_it_ends():
    held, released = Held(), threading.Event()
    threads = LoopThreads(1, "test", seconds_to_leave=0.05)
    threads.submit(held, 0)
    assert held.has_begun.wait(30)
    threads.leave(released.set)
    assert not released.is_set()
    held.may_end.set()
    assert released.wait(30)


def test_a_wait_that_is_interrupted_still_releases(monkeypatch):
    held, released = Held(), threading.Event()
    threads = LoopThreads(1, "test")
    threads.submit(held, 0)
    assert held.has_begun.wait(30)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(threads._is_idle, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.leave(released.set)
    assert not released.is_set()
    held.may_end.set()
    assert released.wait(30)


def test_what_was_submitted_and_lost_by_an_interrupt_is_waited_for():
    held, released = Held(), threading.Event()
    threads = LoopThreads(1, "test", seconds_to_leave=0.05)
    threads._pool.submit(threads._run, held, 0)  # whose future nobody has
    assert held.has_begun.wait(30)
    threads.leave(released.set)
    assert not released.is_set()
    held.may_end.set()
    assert released.wait(30)


def test_loops_without_work_are_left_at_once():
    released = []
    LoopThreads(1, "test").leave(lambda: released.append(1))
    assert released == [1]
