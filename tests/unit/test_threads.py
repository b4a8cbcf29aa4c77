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
from kdcache.threads import LoopThreads

def loop(work):
    threads, asked = LoopThreads(1, "loop"), []
    try:
        for step in itertools.count():
            asked.append(threads.submit(work, step))
            yield step
    finally:
        threads.leave(asked)

def abandoned(work):
    left = [loop(work)]
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
LoopThreads(1, "other").submit(int).result(20)
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
sys.exit(status)
"""


@pytest.mark.parametrize(
    "where", [WITHIN_THE_START_OF_A_THREAD, IN_ITS_OWN_THREAD, IN_A_FORKED_PROCESS],
    ids=["within the start of a thread", "in its own thread", "in a forked process"],
)  # fmt: skip
def test_a_loop_that_the_garbage_collector_ends_does_not_stand_still(where):
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", LOOP + where], check=True, timeout=60)
    assert time.monotonic() - start < 15


def test_threads_end_with_their_loop():
    threads = LoopThreads(2, "a-loop-of-this-test")
    asked = [threads.submit(time.sleep, 0.01) for _ in range(4)]
    assert threads.leave(asked) == []
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("a-loop-of-this-test") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_has_not_begun_is_not_done():
    has_begun, may_end, done = threading.Event(), threading.Event(), []
    threads = LoopThreads(1, "test")

    def work(step):
        has_begun.set()
        may_end.wait(30)
        done.append(step)

    asked = [threads.submit(work, step) for step in range(3)]
    has_begun.wait(30)
    threading.Timer(0.1, may_end.set).start()
    assert threads.leave(asked) == []
    assert done == [0]
    assert [future.cancelled() for future in asked] == [False, True, True]


def test_what_takes_too_long_is_told(monkeypatch):
    monkeypatch.setattr("kdcache.threads._SECONDS_TO_LEAVE", 0.05)
    may_end = threading.Event()
    threads = LoopThreads(1, "test")
    asked = [threads.submit(may_end.wait, 30)]
    while not asked[0].running():
        time.sleep(0.001)
    assert threads.leave(asked) == asked
    may_end.set()
