"""What is made ahead comes in order, once each, however quick or slow it is made."""

from __future__ import annotations

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


def test_an_iteration_that_is_left_leaves_no_thread():
    before = threading.active_count()
    ahead = made_ahead(slowly, itertools.count(), depth=2)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
