"""The fault matrix: nothing that happens to a file of a cache makes a reading give a wrong row."""

from __future__ import annotations

import pytest
from fault_matrix import CACHES, READINGS, run_cache
from object_servers import SERVERS

from kdcache.store.reader import Expected

QUICK = {name: READINGS[name] for name in ("read", "loader, windows", "allow_incomplete")}


@pytest.mark.parametrize("name", ["codes", pytest.param("spectral", marks=pytest.mark.slow)])
def test_no_fault_gives_a_wrong_row_or_another_error_and_verify_finds_each(name, tmp_path):
    matrix = run_cache(name, str(tmp_path), flips=1, readings=QUICK)
    assert matrix.failures == []
    assert matrix.total(outcome="error") > 350
    assert matrix.total(outcome="right rows") > 200
    assert matrix.total(outcome="found") > 150


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_no_fault_gives_a_wrong_row_through_any_reading(name, tmp_path):
    assert run_cache(name, str(tmp_path), flips=16).failures == []


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVERS)
def test_no_fault_gives_a_wrong_row_from_an_object_store(server, bucket_of):
    matrix = run_cache("codes", bucket_of(server), flips=1, readings=QUICK)
    assert matrix.failures == []
    assert matrix.total(outcome="error") > 350


def test_a_wrong_row_would_be_seen(tmp_path, monkeypatch):
    """The matrix itself: without the check that binds chunks to their records it has failures to show."""
    monkeypatch.setattr("kdcache.store.teachers._expected", lambda *_: Expected())
    matrix = run_cache("codes", str(tmp_path), flips=0, readings=QUICK, only=lambda fault: "exchanged" in fault.kind)
    assert matrix.total(outcome="WRONG ROWS") > 0
