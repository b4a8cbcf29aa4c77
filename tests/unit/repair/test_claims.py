"""Two repairs of one cache: the second is refused, and a killed one is in nobody's way."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from damage import cut
from tiny_caches import build_tiny, files_of, tiny_teachers, tiny_transfer_set

from kdcache import Codes, repair_cache, verify_cache
from kdcache.errors import CacheNotFoundError, StoreError
from kdcache.repair import claim as claims
from kdcache.repair.claim import claim_repair
from kdcache.store import LocalObjects, open_objects
from kdcache.store.writers import this_machine

CODES = Codes(spacing="uniform")
SHARD = "teachers/a/codes/c/1/0"
ELSEWHERE = "0badcafe"
HOLD = """
import sys
from kdcache.repair.claim import claim_repair
from kdcache.store import LocalObjects, open_objects
with claim_repair(LocalObjects(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A cache with a torn shard."""
    folder = shutil.copytree(built, tmp_path / "cache")
    cut(folder / SHARD)
    return folder


@pytest.fixture
def quick_waits(monkeypatch):
    monkeypatch.setattr(claims, "_WAIT_SECONDS", 0.001)


def repair(folder):
    return repair_cache(folder, tiny_transfer_set(), tiny_teachers(1))


def put_claim(folder, *, machine=ELSEWHERE, pid=1, age_seconds=0.0, text=None):
    path = folder / f"repairs/{machine}-{pid}-{secrets.token_hex(8)}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"written_unix_s": time.time() - age_seconds}) if text is None else text)
    return path


@pytest.mark.usefixtures("quick_waits")
def test_a_second_repair_is_refused_and_changes_nothing(folder):
    with claim_repair(LocalObjects(folder)):
        before = files_of(folder)
        with pytest.raises(StoreError, match=r"is being repaired already, as repairs/.* says\. Nothing was changed"):
            repair(folder)
        assert files_of(folder) == before


@pytest.mark.usefixtures("quick_waits")
def test_a_second_repair_goes_on_once_the_first_has_ended(folder, built):
    with claim_repair(LocalObjects(folder)), pytest.raises(StoreError):
        repair(folder)
    assert repair(folder).is_complete
    assert files_of(folder) == files_of(built)


@pytest.mark.usefixtures("quick_waits")
def test_a_repair_is_refused_while_another_process_is_at_it_and_not_once_that_is_killed(folder, built):
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(StoreError, match="is being repaired already"):
            repair(folder)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert len(list((folder / "repairs").iterdir())) == 1
    assert repair(folder).is_complete
    assert files_of(folder) == files_of(built)


def test_of_many_repairs_at_once_no_two_are_at_work_together(folder):
    at_work, together, refused = threading.Semaphore(1), [], []

    def claim(_):
        try:
            with claim_repair(LocalObjects(folder)):
                is_alone = at_work.acquire(blocking=False)
                together.append(not is_alone)
                time.sleep(0.01)
                at_work.release()
        except StoreError as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(claim, range(40)))
    assert (len(together) + len(refused), any(together), len(together) > 0) == (40, False, True)


@pytest.mark.usefixtures("quick_waits")
def test_a_repair_at_work_on_another_machine_refuses_this_one(folder):
    put_claim(folder, age_seconds=claims.LEASE_SECONDS - 60)
    with pytest.raises(StoreError, match="delete that file, or run this again 30 minutes later"):
        repair(folder)


@pytest.mark.parametrize(
    "left",
    [
        {"age_seconds": claims.LEASE_SECONDS + 1},
        {"age_seconds": -claims.LEASE_SECONDS - 60},
        {"text": '{"written_unix_s": NaN}'},
        {"text": "{"},
        {"text": "[]"},
        {"machine": this_machine(), "pid": os.getpid()},
        {"machine": this_machine(), "pid": 2**22 + 1},
    ],
    ids=["old", "of a time to come", "no time", "torn", "no claim", "of this process", "of a dead process"],
)
def test_what_a_dead_repair_left_is_taken_away(folder, built, left):
    put_claim(folder, **left)
    assert repair(folder).is_complete
    assert files_of(folder) == files_of(built)


def test_other_files_in_the_folder_of_the_claims_stay_and_are_in_nobodys_way(folder):
    (folder / "repairs").mkdir()
    (folder / "repairs/README.txt").write_text("mine")
    assert repair(folder).is_complete
    assert (folder / "repairs/README.txt").read_text() == "mine"


def test_a_repair_that_was_taken_for_dead_stops_before_its_next_change(folder, monkeypatch):
    def verify_meanwhile(*arguments, **options):
        for path in (folder / "repairs").iterdir():
            path.unlink()
        return verify_cache(*arguments, **options)

    before = files_of(folder)
    monkeypatch.setattr("kdcache.repair.repairing.verify_cache", verify_meanwhile)
    with pytest.raises(StoreError, match="another repair took this one for dead"):
        repair(folder)
    assert files_of(folder) == before


def test_a_claim_is_written_anew_while_its_repair_is_at_work(folder, monkeypatch):
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.01)
    with claim_repair(LocalObjects(folder)) as claim:
        path = folder / claim.key
        first, deadline = path.read_bytes(), time.monotonic() + 20
        while path.read_bytes() == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.read_bytes() != first


def test_a_claim_that_was_taken_away_does_not_come_back(folder, monkeypatch):
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.01)
    with claim_repair(LocalObjects(folder)) as claim:
        claim.objects.delete(claim.key)
        time.sleep(0.2)
        assert not (folder / claim.key).exists()


def test_a_dry_run_asks_for_no_claim_and_leaves_none(folder):
    put_claim(folder)
    before = files_of(folder)
    assert repair_cache(folder, dry_run=True).actions
    assert files_of(folder) == before


def test_where_no_cache_stands_no_claim_is_written(tmp_path):
    with pytest.raises(CacheNotFoundError):
        repair_cache(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_verify_says_what_a_claim_is(folder):
    path = put_claim(folder)
    (note,) = verify_cache(folder).notes
    assert (note.key, "of a repair that is at work" in note.what) == (f"repairs/{path.name}", True)


@pytest.mark.parametrize("server", ["nanio", pytest.param("moto", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("quick_waits")
def test_a_second_repair_in_an_object_store_is_refused_too(bucket_of, server):
    address = bucket_of(server)
    build_tiny(address, teachers=tiny_teachers(1), codec=CODES)
    objects = open_objects(address)
    objects.delete(SHARD)
    with claim_repair(objects), pytest.raises(StoreError, match="is being repaired already"):
        repair(address)
    assert repair(address).is_complete
    assert list(objects.list("repairs")) == []
