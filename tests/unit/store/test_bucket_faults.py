"""Failures on the way to an object store: tried again, told apart, and never endless."""

from __future__ import annotations

import threading
import time

import pytest
from faulty_proxy import FOREVER, STALL_SECONDS, proxy_before
from tiny_caches import build_tiny

from kdcache import open_cache, verify_cache
from kdcache.errors import StoreError
from kdcache.store.bucket_address import RequestLimits
from kdcache.store.bucket_objects import BucketObjects

KEY = "teachers/a/codes/c/0/0"
LIMITS = RequestLimits(
    connect_seconds=1, stall_seconds=0.5, request_seconds=1, retry_seconds=1.5, first_wait_seconds=0.05
)
LONGEST_SECONDS = 2 * (LIMITS.request_seconds + LIMITS.retry_seconds) + STALL_SECONDS


@pytest.fixture(params=["moto", pytest.param("nanio", marks=pytest.mark.slow)])
def behind(request, server_of, monkeypatch):
    """Give objects behind a proxy, and what tells the proxy to fail; creating them is tried out already."""
    server = server_of(request.param)
    with proxy_before(server.endpoint) as (endpoint, faults):
        for name, value in server.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        objects = BucketObjects(server.new_address(), LIMITS)
        objects.publish("first", b"")
        yield objects, faults


ONCE = ["500", "503", "reset", "stall"]


@pytest.mark.parametrize("failure", [*ONCE, "cut short", "lost answer"])
def test_reading_is_tried_again(behind, failure):
    objects, faults = behind
    objects.publish(KEY, bytes(range(256)) * 1000)
    faults.plan(failure, "GET")
    assert objects.read(KEY) == bytes(range(256)) * 1000
    faults.plan(failure, "GET")
    assert objects.read_range(KEY, 1000, 3) == bytes(range(232, 235))


@pytest.mark.parametrize("failure", [*ONCE, "lost answer"])
def test_publishing_is_tried_again_and_won(behind, failure):
    objects, faults = behind
    faults.plan(failure, "PUT")
    assert objects.publish(KEY, b"ours")
    assert faults.seen.count("PUT") > 1
    assert objects.read(KEY) == b"ours"


@pytest.mark.parametrize("failure", [*ONCE, "lost answer"])
def test_replacing_is_tried_again(behind, failure):
    objects, faults = behind
    objects.publish(KEY, b"before")
    faults.plan(failure, "PUT")
    objects.replace(KEY, b"after")
    assert objects.read(KEY) == b"after"


@pytest.mark.parametrize("failure", ["500", "reset"])
def test_asking_for_a_size_and_listing_are_tried_again(behind, failure):
    objects, faults = behind
    objects.publish(KEY, b"ours")
    faults.plan(failure, "HEAD", times=2)
    assert objects.size(KEY) == 4
    faults.plan(failure, "GET", times=2)
    assert KEY in list(objects.list(""))


@pytest.fixture
def conditional(server_of, monkeypatch):
    """Give objects of a server that refuses to replace, behind a proxy."""
    server = server_of("moto")
    with proxy_before(server.endpoint) as (endpoint, faults):
        for name, value in server.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        objects = BucketObjects(server.new_address(), LIMITS)
        objects.publish("first", b"")
        yield objects, faults


def test_who_lost_the_race_and_the_answer_too_is_told_so(conditional, monkeypatch):
    objects, faults = conditional
    size = objects.client.size

    def size_before_the_other_wrote(path):
        found = size(path)
        BucketObjects(objects.address, LIMITS).replace(KEY, b"theirs")
        return found

    monkeypatch.setattr(objects.client, "size", size_before_the_other_wrote)
    faults.plan("lost answer", "PUT", after=1)
    assert not objects.publish(KEY, b"ours")
    assert objects.read(KEY) == b"theirs"


FOR_EVER = [("stall", "GET"), ("503", "PUT"), ("reset", "HEAD")]
FURTHER = [("stall", "PUT"), ("stall", "HEAD"), ("503", "GET"), ("503", "HEAD"), ("reset", "GET"), ("reset", "PUT")]


@pytest.mark.parametrize(
    ("failure", "method"), [*FOR_EVER, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in FURTHER)]
)
def test_a_server_that_fails_for_ever_ends_in_an_error_in_bounded_time(conditional, failure, method):
    objects, faults = conditional
    objects.publish(KEY, b"ours")
    calls = {
        "GET": lambda: objects.read(KEY),
        "PUT": lambda: objects.replace(KEY, b""),
        "HEAD": lambda: objects.size(KEY),
    }
    faults.plan(failure, method, times=FOREVER)
    started = time.monotonic()
    with pytest.raises(
        StoreError, match=rf"{method} s3://caches/.*{KEY} failed .*try again: a build goes on from what stands"
    ):
        calls[method]()
    assert time.monotonic() - started < LONGEST_SECONDS


def test_publishing_to_a_server_that_loses_every_answer_is_won_all_the_same(conditional):
    objects, faults = conditional
    faults.plan("lost answer", "PUT", times=FOREVER)
    assert objects.publish(KEY, b"ours")


def test_publishing_that_never_gets_through_ends_in_an_error(conditional):
    objects, faults = conditional
    faults.plan("reset", "PUT", times=FOREVER)
    with pytest.raises(StoreError, match="it is unknown whether a request to store was carried out"):
        objects.publish(KEY, b"ours")
    faults.plan("", "")
    assert objects.publish(KEY, b"ours")


def test_requests_of_many_threads_are_bounded(conditional):
    objects, _ = conditional
    few = BucketObjects(objects.address, RequestLimits(num_connections=2))
    objects.publish(KEY, b"ours")
    at_once = []
    running = threading.Semaphore(0)
    request = few.client._obstore.get

    class Counting:
        exceptions = few.client._obstore.exceptions

        @staticmethod
        def get(*arguments):
            running.release()
            at_once.append(running._value)
            time.sleep(0.02)
            answer = request(*arguments)
            running.acquire()
            return answer

    few.client._obstore = Counting
    threads = [threading.Thread(target=few.read, args=(KEY,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(at_once) == 2


def test_a_store_that_does_not_answer_is_no_damage(conditional, monkeypatch):
    objects, faults = conditional
    monkeypatch.setattr("kdcache.store.store.open_objects", lambda _: objects)
    objects.delete("first")
    build_tiny(objects.address)
    assert verify_cache(objects.address).is_sound
    faults.plan("503", "GET", times=FOREVER, after=12)
    with pytest.raises(StoreError, match=r"GET .* failed"):
        verify_cache(objects.address)


def test_an_example_table_that_is_not_answered_is_no_damage(conditional, monkeypatch):
    objects, faults = conditional
    monkeypatch.setattr("kdcache.store.store.open_objects", lambda _: objects)
    objects.delete("first")
    build_tiny(objects.address)
    cache = open_cache(objects.address)
    faults.plan("503", "GET", times=FOREVER)
    with pytest.raises(StoreError, match=r"GET .*examples.parquet failed"):
        _ = cache.labels
