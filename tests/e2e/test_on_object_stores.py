"""Caches on object stores: built, resumed, read, joined and checked there as in a folder, with equal data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count

import numpy as np
import pytest
import torch
from faulty_proxy import proxy_before
from object_servers import SERVERS
from tiny_caches import NUM_EXAMPLES, OPTIONS, Stop, build_tiny, tiny_inputs, tiny_teachers, tiny_transfer_set

import kdcache
from kdcache import cli
from kdcache.build import read_status
from kdcache.documents import DaskLocal
from kdcache.errors import CacheExistsError, CacheNotFoundError, IncompleteCacheError, StoreError
from kdcache.store import CacheStore, open_objects
from kdcache.store.bucket_objects import BucketObjects

IDS = [3, 0, 39, 17]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("local") / "cache")


ON_ONE = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("localbucket", "moto")), "nanio"]
"""Tests that take long run on the server that asks most of kdcache; on the others in `make test-all`."""


@pytest.fixture(params=ON_ONE)
def address(request, bucket_of):
    return bucket_of(request.param)


@pytest.fixture(scope="module")
def built_before():
    return {}


@pytest.fixture(params=SERVERS)
def built(request, bucket_of, built_before):
    """Give a finished cache on each server, made once; not to be changed."""
    address = bucket_of(request.param)
    if request.param not in built_before:
        built_before[request.param] = build_tiny(address).address
    return kdcache.open_cache(built_before[request.param])


@pytest.fixture
def nearby(bucket_of):
    """Give an address on one of the servers, for what does not depend on them."""
    return bucket_of("moto")


def test_a_cache_built_there_holds_the_data_of_one_in_a_folder(built, local):
    assert built.complete.data_digest == local.complete.data_digest
    assert kdcache.verify_cache(built.address).is_sound


def test_soft_targets_read_there_are_those_of_a_folder(built, local):
    expected = local.read(IDS).probabilities(temperature=4.0)
    torch.testing.assert_close(built.read(IDS).probabilities(temperature=4.0), expected, rtol=0, atol=0)
    np.testing.assert_array_equal(built.labels, local.labels)


def test_a_teacher_is_added_to_a_cache_that_stands_there(address, tmp_path):
    teachers = tiny_teachers(3)
    build_tiny(address)
    added = build_tiny(address, teachers=teachers, add_teachers=True)
    assert added.teacher_names == ("a", "b", "c")
    assert added.complete.data_digest == build_tiny(tmp_path / "three", teachers=teachers).complete.data_digest
    assert kdcache.verify_cache(address).is_sound


class StoppingBucket(BucketObjects):
    """Objects of a bucket that stop before a write, and write nothing from then on."""

    def __init__(self, address, writes, at):
        super().__init__(address)
        self._writes = writes
        self._at = at

    def publish(self, key, data):
        self._count()
        return super().publish(key, data)

    def replace(self, key, data):
        self._count()
        super().replace(key, data)

    def _count(self):
        if next(self._writes) >= self._at:
            raise Stop


def build_and_stop(address, monkeypatch, *, at):
    writes = count()
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.store.open_objects", lambda where: StoppingBucket(where, writes, at))
        with pytest.raises(Stop):
            build_tiny(address)


@pytest.mark.parametrize("at", [*(pytest.param(at, marks=pytest.mark.slow) for at in (1, 7, 12, 17)), 22])
def test_a_build_that_stops_there_is_finished_by_the_same_call(address, local, monkeypatch, at):
    build_and_stop(address, monkeypatch, at=at)
    assert build_tiny(address).complete.data_digest == local.complete.data_digest
    assert kdcache.verify_cache(address).is_sound


def test_an_unfinished_cache_there_is_told_apart(nearby, monkeypatch):
    build_and_stop(nearby, monkeypatch, at=16)
    with pytest.raises(IncompleteCacheError, match=nearby):
        kdcache.open_cache(nearby)
    assert not read_status(nearby).is_complete


JOB = """
name = "tiny"
[cache]
address = "{address}"
shard_rows = 64
[transfer_set]
factory = "slow_job:transfer_set"
arguments = {{ num_examples = 1024 }}
[build]
batch_size = 32
[[teachers]]
name = "a"
factory = "slow_job:teacher"
arguments = {{ seed = 0, seconds = 0.03 }}
"""


@pytest.fixture
def job(tmp_path, request):
    """Write a job file of a slow teacher for an address."""
    fixtures = request.config.rootpath / "tests" / "fixtures"
    (tmp_path / "slow_job.py").write_text((fixtures / "slow_job.py").read_text())

    numbers = count()

    def written(address):
        path = tmp_path / f"{next(numbers)}.toml"
        path.write_text(JOB.format(address=address))
        return path

    return written


def start_build(job):
    command = [sys.executable, "-m", "kdcache", "build", str(job), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digest_of(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)["data_digest"]


def wait_for_shards(address, num_shards, process):
    objects = open_objects(address)
    while len(list(objects.list("commits/a"))) < num_shards:
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_build_that_is_killed_is_finished_by_the_same_command_with_equal_data(address, job, tmp_path):
    process = start_build(job(address))
    wait_for_shards(address, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = digest_of(start_build(job(address)))
    assert finished == digest_of(start_build(job(tmp_path / "local")))
    assert kdcache.verify_cache(address).is_sound


@pytest.mark.slow
def test_two_builders_at_once_harm_nothing(address, job, tmp_path):
    builders = [start_build(job(address)) for _ in range(2)]
    expected = digest_of(start_build(job(tmp_path / "local")))
    assert [digest_of(builder) for builder in builders] == [expected] * 2
    assert kdcache.verify_cache(address).is_sound


@pytest.mark.slow
def test_workers_of_a_local_cluster_build_there(address, local):
    built = build_tiny(address, executor=DaskLocal(num_workers=2))
    assert built.complete.data_digest == local.complete.data_digest


@pytest.mark.parametrize("tier", ["memory", "mapped", "windows", "scattered"])
def test_a_loader_gives_the_batches_of_a_folder(nearby, local, tmp_path, tier):
    folder = {"local_copy": tmp_path / "copy"} if tier == "mapped" else {}
    options = {"inputs": tiny_transfer_set(), "batch_size": 16, "seed": 0, "tier": tier, "device": "cpu"}
    ours = list(kdcache.SoftTargetLoader(build_tiny(nearby), **options, **folder))
    theirs = list(kdcache.SoftTargetLoader(local, **options, **({"local_copy": tmp_path / "local"} if folder else {})))
    assert len(ours) == len(theirs) > 0
    for (inputs, labels, soft_targets), expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close((inputs, labels), expected[:2], rtol=0, atol=0)
        torch.testing.assert_close(soft_targets.logits(), expected[2].logits(), rtol=0, atol=0)


def test_rows_are_joined_with_batches_of_a_loader(built, local):
    dataset = [{"example_id": index, "inputs": row} for index, row in enumerate(tiny_inputs())]
    loader = torch.utils.data.DataLoader(dataset, batch_size=7)
    joined = list(built.join(loader, key="example_id"))
    expected = list(local.join(loader, key="example_id"))
    assert len(joined) == len(expected) == 6
    for ours, theirs in zip(joined, expected, strict=True):
        torch.testing.assert_close(ours["soft_targets"].logits(), theirs["soft_targets"].logits(), rtol=0, atol=0)


def test_pages_of_a_cache_there_are_kept_in_a_folder(built, local, tmp_path, monkeypatch):
    expected = local.read(range(NUM_EXAMPLES)).logits()
    kept = kdcache.open_cache(built.address, local_cache=tmp_path / "pages")
    torch.testing.assert_close(kept.read(range(NUM_EXAMPLES)).logits(), expected, rtol=0, atol=0)
    again = kdcache.open_cache(built.address, local_cache=tmp_path / "pages")
    monkeypatch.setattr(BucketObjects, "read_ranges", lambda *_: pytest.fail("a shard was read where it lies"))
    torch.testing.assert_close(again.read(range(NUM_EXAMPLES)).logits(), expected, rtol=0, atol=0)


def test_the_first_rows_of_a_shard_take_two_requests_and_no_size(built, server_of, monkeypatch):
    name = next(name for name in SERVERS if server_of(name).endpoint == os.environ["AWS_ENDPOINT_URL"])
    with proxy_before(server_of(name).endpoint) as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        cache = kdcache.open_cache(built.address)
        cache.codes_readers()
        faults.plan("", "")
        cache.read_rows(np.array([0]), teachers="a")
    asked = [(verb, path.split("/", 4)[-1]) for verb, path in zip(faults.seen, faults.paths, strict=True)]
    assert asked == [("GET", "commits/a/0.json"), ("GET", "teachers/a/codes/c/0/0")]


def test_every_array_opens_there_in_plain_zarr(built, local):
    codes = built.store.zarr_group()["teachers/a/codes"][:]
    np.testing.assert_array_equal(codes, local.store.zarr_group()["teachers/a/codes"][:])


def test_zarr_opens_a_cache_whose_pages_are_kept_in_a_folder(built, tmp_path):
    kept = kdcache.open_cache(built.address, local_cache=tmp_path / "pages")
    assert kept.store.zarr_group()["teachers/a/codes"].shape == built.store.zarr_group()["teachers/a/codes"].shape


def test_damage_there_is_found(nearby):
    build_tiny(nearby)
    shard = "teachers/a/codes/c/1/0"
    objects = open_objects(nearby)
    objects.replace(shard, bytes(len(objects.read(shard))))
    assert not kdcache.verify_cache(nearby).is_sound


COMMANDS = """
name = "tiny"
[cache]
address = "{address}"
shard_rows = 16
chunk_rows = 8
[transfer_set]
factory = "bucket_sources:transfer_set"
[build]
batch_size = 12
[[teachers]]
name = "a"
factory = "bucket_sources:network"
[evaluation]
factory = "bucket_sources:evaluation"
[[students]]
name = "linear"
factory = "bucket_sources:network"
temperatures = [1.0, 4.0]
epochs = 1
batch_size = 16
"""

SOURCES = """
import torch
from tiny_caches import TinyTeacher, tiny_inputs, tiny_labels, tiny_transfer_set


def transfer_set():
    return tiny_transfer_set()


def evaluation():
    return tiny_inputs(), torch.tensor(tiny_labels())


def network():
    return TinyTeacher()
"""


@pytest.fixture
def command(nearby, tmp_path, monkeypatch, capsys):
    """Run a command in this process, on a job whose cache lies in an object store; gives what it printed as JSON."""
    (tmp_path / "bucket_sources.py").write_text(SOURCES)
    (tmp_path / "job.toml").write_text(COMMANDS.format(address=nearby))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return json.loads(printed.out)

    yield run
    sys.modules.pop("bucket_sources", None)


def test_every_command_takes_an_address_there(command, nearby, tmp_path):
    job = tmp_path / "job.toml"
    assert command("plan", job)["address"] == nearby
    assert command("build", job)["address"] == nearby
    assert command("status", nearby)["is_complete"]
    assert command("verify", nearby)["is_sound"]
    assert command("info", nearby)["address"] == nearby
    assert command("train", job, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "students" / "linear" / "metrics.jsonl").exists()


def test_an_address_where_nothing_stands_is_no_cache(nearby):
    with pytest.raises(CacheNotFoundError, match=nearby):
        kdcache.open_cache(nearby)


def test_a_folder_of_other_objects_is_not_built_over(nearby):
    open_objects(nearby).publish("something", b"else")
    with pytest.raises(CacheExistsError, match="nothing was written"):
        build_tiny(nearby)


def test_a_bucket_that_is_not_there_is_named_with_a_remedy(nearby):
    with pytest.raises(StoreError, match=r"there is no bucket 'another'.*Make the bucket"):
        kdcache.open_cache(nearby.replace("s3://caches", "s3://another"))
    with pytest.raises(StoreError, match="there is no bucket 'another'"):
        build_tiny(nearby.replace("s3://caches", "s3://another"))


def test_a_cache_there_is_planned_without_writing(nearby):
    kdcache.plan_cache(nearby, tiny_transfer_set(), tiny_teachers(), **OPTIONS)
    assert list(CacheStore.at(nearby).objects.list("")) == []
