"""Builds, stops, additions, damage, verifying and repairing in any order: no row is ever wrong, and all ends well.

The model is small: the logits of every example and teacher, and the data digest of an undisturbed build of each
ensemble.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_caches import Stop, StoppingObjects, build_tiny, files_of, tiny_teachers, tiny_transfer_set

from kdcache import Codes, open_cache, repair_cache, verify_cache
from kdcache.errors import KdcacheError
from kdcache.store import store as store_module

CODES = Codes(spacing="uniform")
IDS = range(40)
NAMES = ("a", "b")
WRITES = 70
"""Changes after which a process may stop: somewhat more than a whole build has."""


class StoppingDeletes(StoppingObjects):
    """Stops before its change number `at`, deletions counted too."""

    def delete(self, key):
        self._count()
        return super().delete(key)


@contextlib.contextmanager
def stopped_before(at):
    """Have whatever changes the cache stop before its change number `at`; never where None."""
    changes = itertools.count()
    with (
        mock.patch.object(store_module, "open_objects", lambda root: StoppingDeletes(root, changes, at)),
        contextlib.suppress(Stop),
    ):
        yield


class Undisturbed:
    """Caches that nothing happened to: of teacher a, and of a and then b."""

    def __init__(self, folder):
        self.folder = folder
        build_tiny(folder / "1", teachers=tiny_teachers(1), codec=CODES)
        build_tiny(folder / "added", teachers=tiny_teachers(1), codec=CODES)
        build_tiny(folder / "added", teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
        build_tiny(folder / "2", teachers=tiny_teachers(2), codec=CODES)
        caches = {1: open_cache(folder / "1"), 2: open_cache(folder / "2")}
        assert open_cache(folder / "added").complete.data_digest == caches[2].complete.data_digest
        self.logits = {name: caches[2].read(IDS, teachers=[name]).logits() for name in NAMES}
        self.digest = {count: cache.complete.data_digest for count, cache in caches.items()}


class CacheMachine(RuleBasedStateMachine):
    """One cache, and everything that may happen to it."""

    undisturbed: Undisturbed

    @initialize(num_built=st.sampled_from([0, 1, 2]))
    def begin(self, num_built):
        self.place = Path(tempfile.mkdtemp(dir=self.undisturbed.folder)) / "cache"
        self.num_teachers = max(1, num_built)
        self.is_begun_with = num_built  # teachers of the first plan; 0 before there is any
        if num_built:
            shutil.copytree(self.undisturbed.folder / str(num_built), self.place)
        self.is_damaged = False
        self.readers = []

    def teardown(self):
        shutil.rmtree(getattr(self, "place", Path("/nowhere")).parent, ignore_errors=True)

    # What changes the cache ------------------------------------------------------------------------------------------

    @rule(at=st.none() | st.integers(0, WRITES))
    def build(self, at):
        """Run the build of the present ensemble; a damaged cache may refuse it, with an error of kdcache's own."""
        before = self._files()
        with stopped_before(at):
            try:
                self._build()
            except KdcacheError:
                assert self.is_damaged
                return
            assert open_cache(self.place).teacher_names == NAMES[: self.num_teachers] or self.is_damaged
        self._note(before)

    @precondition(
        lambda self: self.num_teachers == 1 and (self.place / "complete.json").exists() and not self.is_damaged
    )
    @rule()
    def want_another_teacher(self):
        self.num_teachers = 2

    @precondition(lambda self: self.place.exists() and any(self.place.rglob("*.json")))
    @rule(data=st.data(), kind=st.sampled_from(["exchange", "delete", "flip", "truncate"]))
    def damage(self, data, kind):
        files = files_of(self.place)
        keys = sorted(key for key in files if not Path(key).name.startswith("."))
        shards = [key for key in keys if "/codes/c/" in key]
        if kind == "exchange" and len(shards) > 1:
            first = data.draw(st.integers(0, len(shards) - 1))
            pair = shards[first], shards[first - 1]
            changes = {pair[0]: files[pair[1]], pair[1]: files[pair[0]]}
        else:
            key = data.draw(st.sampled_from(keys))
            content = files[key]
            place = data.draw(st.integers(0, max(0, 8 * len(content) - 1)))
            changes = {key: None if kind == "delete" else _damaged(content, kind, place)}
        self._apply(files, changes)

    @precondition(lambda self: self.place.exists())
    @rule(with_teachers=st.booleans(), at=st.none() | st.integers(0, 30))
    def repair(self, with_teachers, at):
        before = self._files()
        with stopped_before(at), contextlib.suppress(KdcacheError):
            self._repair(with_teachers=with_teachers)
        self._note(before)

    @precondition(lambda self: self.place.exists() and self.is_begun_with)
    @rule()
    def mend_and_build(self):
        """Repair with the teachers, build, and find the data of the undisturbed build; where there is a plan at all."""
        try:
            self._repair(with_teachers=True)
            self._build()
        except KdcacheError:
            assert self.is_damaged
            shutil.rmtree(self.place)  # documents that nothing else tells: the cache is built anew
            self.is_damaged, self.is_begun_with, self.readers = False, 0, []
            return
        assert open_cache(self.place).complete.data_digest == self.undisturbed.digest[self.num_teachers]
        report = verify_cache(self.place, level="deep")
        assert report.findings == ()
        self.is_damaged = False

    # What reads it ---------------------------------------------------------------------------------------------------

    @rule()
    def open_a_reader(self):
        with contextlib.suppress(KdcacheError):
            self.readers.append(open_cache(self.place))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read_later(self, data):
        self._holds(data.draw(st.sampled_from(self.readers)))

    @precondition(lambda self: self.place.exists())
    @rule(level=st.sampled_from(["quick", "digests", "deep"]))
    def verify(self, level):
        try:
            report = verify_cache(self.place, level=level)
        except KdcacheError:
            assert self.is_damaged or not self.is_begun_with
            return
        assert self.is_damaged or report.findings == ()

    @invariant()
    def no_reading_gives_a_wrong_row(self):
        for allow_incomplete in (False, True):
            with contextlib.suppress(KdcacheError):
                self._holds(open_cache(self.place, allow_incomplete=allow_incomplete))

    # Parts ------------------------------------------------------------------------------------------------------------

    def _build(self):
        adds = self.num_teachers > self.is_begun_with > 0
        return build_tiny(self.place, teachers=tiny_teachers(self.num_teachers), codec=CODES, add_teachers=adds)

    def _repair(self, *, with_teachers):
        if with_teachers:
            return repair_cache(self.place, tiny_transfer_set(), tiny_teachers(self.num_teachers))
        return repair_cache(self.place)

    def _files(self):
        return files_of(self.place) if self.place.exists() else {}

    def _note(self, before):
        """Note with how many teachers the first plan was made, once there is one."""
        if not self.is_begun_with and (self.place / "plans/0.json").exists():
            self.is_begun_with = self.num_teachers
        assert before is not None

    def _apply(self, files, changes):
        for key, content in changes.items():
            if content is None:
                (self.place / key).unlink()
            elif content != files[key]:
                (self.place / key).write_bytes(content)
        self.is_damaged = True
        if any(_means_another(files[key], content) for key, content in changes.items()):
            self._is_found(files, changes)

    def _is_found(self, files, changes):
        """Verify finds what changes a file's meaning: in a finished cache always, in another where anything vouches."""
        if "complete.json" not in files or "complete.json" in changes:
            return
        with contextlib.suppress(KdcacheError):
            assert verify_cache(self.place).findings != ()

    def _holds(self, cache):
        with contextlib.suppress(KdcacheError):
            read = cache.read(IDS)
            available = slice(None) if read.available is None else read.available
            for name in cache.teacher_names:
                logits = cache.read(IDS, teachers=[name]).logits()
                assert torch.equal(logits[available], self.undisturbed.logits[name][available])


def _damaged(content, kind, place):
    if kind == "flip" and content:
        return content[: place // 8] + bytes([content[place // 8] ^ 1 << place % 8]) + content[place // 8 + 1 :]
    return content[: place // 8]


def _means_another(content, changed):
    """Tell whether bytes were changed in more than the spelling of JSON."""
    with contextlib.suppress(ValueError):
        return changed is None or json.loads(changed) != json.loads(content)
    return changed != content


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("stateful"))


def run(undisturbed, **options):
    machine = type("Machine", (CacheMachine,), {"undisturbed": undisturbed})
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck), **options
        ),
    )


def test_whatever_happens_to_a_cache_no_row_is_wrong_and_repair_ends_well(undisturbed):
    run(undisturbed, max_examples=10, stateful_step_count=12)


@pytest.mark.slow
def test_much_may_happen_to_a_cache_and_no_row_is_wrong(undisturbed):
    run(undisturbed, max_examples=400, stateful_step_count=40)
