"""What is made ahead comes in order, once each, however quick or slow it is made."""

from __future__ import annotations

import contextlib
import itertools
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


def failing_steps():
    yield from range(5)
    raise ValueError("no more steps")


@pytest.mark.parametrize("make", [int, slowly])
def test_what_was_asked_for_before_steps_fail_is_given_before_their_error(make):
    given = []
    with pytest.raises(ValueError, match="no more steps"):
        given.extend(made_ahead(make, failing_steps(), depth=2))
    assert given == list(range(5))


def noted(asked):
    for step in range(20):
        asked.append(step)
        yield step


@pytest.mark.parametrize(("one_by_one", "expected"), [(False, [0]), (True, [0, 1, 2])])
def test_the_first_is_made_alone_but_where_processes_are_at_several(one_by_one, expected):
    asked, asked_by_then = [], []

    def make(step):
        deadline = time.monotonic() + 10
        while len(asked) < len(expected) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        asked_by_then.append(list(asked))
        return step

    ahead = made_ahead(make, noted(asked), depth=3, one_by_one=one_by_one)
    next(ahead)
    ahead.close()
    assert asked_by_then[0] == expected


class Making:
    """Makes at once what comes first, and goes on with the second until it may end."""

    def __init__(self) -> None:
        self.has_begun, self.may_end, self.finished = threading.Event(), threading.Event(), []

    def __call__(self, step):
        if step:
            self.has_begun.set()
            self.may_end.wait(30)
        self.finished.append(step)
        return step


def test_what_takes_longer_than_anyone_waits_is_released_when_it_ends_and_nothing_is_made_behind(monkeypatch):
    monkeypatch.setattr("kdcache.threads.SECONDS_TO_LEAVE", 0.05)
    making, released = Making(), threading.Event()
    ahead = made_ahead(making, itertools.count(), depth=2, release=released.set)
    next(ahead)
    making.has_begun.wait(30)
    ahead.close()
    assert not released.is_set()
    making.may_end.set()
    assert released.wait(30)
    assert making.finished == [0, 1]


@pytest.mark.parametrize("end", ["exhausted", "failed", "left"])
def test_all_is_released_once_however_an_iteration_ends(end):
    released = []
    steps = failing_steps() if end == "failed" else iter(range(5))
    ahead = made_ahead(slowly, steps, depth=2, release=lambda: released.append(end))
    with contextlib.suppress(ValueError):
        for given in ahead:
            if end == "left" and given == 2:
                break
    ahead.close()
    assert released == [end]
