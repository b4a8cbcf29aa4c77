"""Forked processes: what another thread held when the process was forked does not stop its child."""

import os
import signal

import numpy as np
import pytest


def exit_code_of(work):
    """Do work in a forked child, and give 0 if it was done, 1 if it failed, and -14 if it hung."""
    child = os.fork()
    if child == 0:  # here nothing may be raised: the test runner's code would go on twice
        signal.alarm(20)
        is_done = False
        try:
            is_done = work()
        finally:
            os._exit(0 if is_done else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("memory", ["_chunks", "_indexes"])
def test_a_child_reads_while_another_thread_of_its_parent_did(written, memory):
    reader = written.reader()
    reader.read_rows(np.array([3]))
    with getattr(reader._reader, memory)._lock:
        assert exit_code_of(lambda: np.array_equal(reader.read_rows(np.array([200, 3])), written.codes[[200, 3]])) == 0


def test_a_child_looks_ids_up_while_another_thread_of_its_parent_did(written):
    with written.store._lock:
        assert exit_code_of(lambda: len(written.store.lookup(written.table.example_ids[:2])[0]) == 2) == 0


def test_a_child_has_a_memory_of_its_own(written):
    reader = written.reader()
    reader.read_rows(np.array([3]))
    assert exit_code_of(lambda: reader._reader._chunks.get(0) is None) == 0
    assert reader._reader._chunks.get(0) is not None
