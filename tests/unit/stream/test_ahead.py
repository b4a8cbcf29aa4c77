"""What is made ahead comes in order, once each, however quick or slow it is made."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import pytest

from kdcache.stream.ahead import made_ahead


def slowly(step):
    time.sleep(0.003)
    return step


@pytest.mark.parametrize("make", [int, slowly])
@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 60])
@pytest.mark.parametrize("depth", [1, 3])
def test_everything_comes_once_and_in_order(make, one_by_one, num_steps, depth):
    assert list(made_ahead(make, iter(range(num_steps)), depth=depth, one_by_one=one_by_one)) == list(range(num_steps))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_slow_ones_are_made_just_ahead(depth):
    asked = itertools.count()
    ahead = made_ahead(slowly, asked, depth=depth)
    for _ in range(3):
        next(ahead)
    ahead.close()
    assert next(asked) <= 3 + depth + 1


def test_quick_ones_are_asked_for_some_at_a_time():
    asked = itertools.count()
    ahead = made_ahead(int, asked, depth=1)
    for _ in range(5):
        next(ahead)
    ahead.close()
    assert 8 <= next(asked) <= 32


def test_one_by_one_means_one_by_one():
    asked = itertools.count()
    ahead = made_ahead(int, asked, depth=1, one_by_one=True)
    for _ in range(5):
        next(ahead)
    ahead.close()
    assert next(asked) <= 7


def fail_at_twenty(step):
    if step == 20:
        raise ValueError(step)
    return step


@pytest.mark.parametrize("one_by_one", [True, False])
def test_what_was_made_before_an_error_is_given_before_it(one_by_one):
    ahead, given = made_ahead(fail_at_twenty, itertools.count(), depth=2, one_by_one=one_by_one), []
    with pytest.raises(ValueError, match="20"):
        given.extend(ahead)
    assert given == list(range(20))


def test_an_iteration_that_is_left_leaves_no_thread():
    before = threading.active_count()
    ahead = made_ahead(slowly, itertools.count(), depth=2)
    next(ahead)
    ahead.close()
    for _ in range(100):  # nobody waits for the thread itself
        if threading.active_count() == before:
            return
        time.sleep(0.01)
    raise AssertionError(threading.enumerate())


def failing_steps():
    yield from range(5)
    raise ValueError("no more steps")


@pytest.mark.parametrize("make", [int, slowly])
def test_what_was_asked_for_before_steps_fail_is_given_before_their_error(make):
    given = []
    with pytest.raises(ValueError, match="no more steps"):
        given.extend(made_ahead(make, failing_steps(), depth=2))
    assert given == list(range(5))


def test_the_first_is_made_alone():
    started = []

    def make(step):
        started.append(step)
        time.sleep(0.02)
        return list(started)

    ahead = made_ahead(make, iter(range(9)), depth=3)
    assert next(ahead) == [0]
    ahead.close()


def test_what_is_being_made_is_waited_for_when_an_iteration_is_left():
    finished = []

    def make(step):
        time.sleep(0.05)
        finished.append(step)
        return step

    ahead = made_ahead(make, itertools.count(), depth=3)
    next(ahead)
    ahead.close()
    left = list(finished)
    time.sleep(0.15)
    assert finished == left


def test_an_iteration_that_the_garbage_collector_ends_within_a_threads_start_does_not_stand_still():
    program = """
import gc, itertools, threading, time
from kdcache.stream.ahead import made_ahead

def slowly(step):
    time.sleep(0.2)
    return step

ahead = made_ahead(slowly, itertools.count(), depth=3)
next(ahead)
cycle = [ahead]
cycle.append(cycle)
gc.disable()
del ahead, cycle
held = threading._shutdown_locks_lock
with held:  # as the start of a thread does
    gc.collect()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
