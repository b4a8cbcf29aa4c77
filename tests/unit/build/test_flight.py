"""Flight on a real cluster in this process: how many are under way, and what becomes of them when it ends early."""

from __future__ import annotations

import threading
import time

import pytest
from distributed import Client

from kdcache.build.executors.flight import Flight, Patience


@pytest.fixture(scope="module")
def flight():
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        yield Flight(client, None, Patience(5.0, 5.0))


@pytest.fixture
def send(flight):
    """Runs what an item is on the cluster."""
    return lambda work: flight._client.submit(work, pure=False)


class Noted:
    """Work that takes some time, and notes that it began and that it ended."""

    def __init__(self, name, seconds=0.0):
        self.name, self.seconds = name, seconds
        self.begun, self.ended = threading.Event(), threading.Event()

    def __reduce__(self):  # in this process: it is the same one wherever it runs
        return work_named, (self.name,)

    def __call__(self):
        self.begun.set()
        time.sleep(self.seconds)
        self.ended.set()
        return self.name


WORK = {}


def work_named(name):
    return WORK[name]


def works(**seconds):
    WORK.clear()
    WORK.update({name: Noted(name, of_it) for name, of_it in seconds.items()})
    return list(WORK.values())


def test_every_item_comes_with_its_result(flight, send):
    found = list(flight.outcomes(works(a=0.0, b=0.0, c=0.0), send, lambda slots: slots))
    assert sorted((item.name, outcome) for item, outcome in found) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_where_no_more_are_wanted_what_is_under_way_is_waited_for_and_the_rest_left(flight, send):
    found = []
    items = works(quick=0.0, slow=0.8, never=0.0)
    for item, outcome in flight.outcomes(items, send, lambda slots: 0 if found else slots):
        found.append((outcome, item.ended.is_set()))
    assert found == [("quick", True), ("slow", True)]
    assert not WORK["never"].begun.is_set()
