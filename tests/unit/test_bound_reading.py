"""Files that are sound in themselves and stand in another's place: no reading path takes them for what they are not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_caches import NUM_EXAMPLES, build_tiny, tiny_teachers

from kdcache import Codes, Lossless, SoftTargetLoader, TransferSet, open_cache
from kdcache.errors import CorruptCacheError

SHARD = "teachers/a/codes/c/{}/0"
RECORD = "commits/a/{}.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bound") / "cache"
    build_tiny(folder, teachers=tiny_teachers(2), codec=Lossless())
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


def swap(folder, first, second):
    held = (folder / first).read_bytes()
    (folder / first).write_bytes((folder / second).read_bytes())
    (folder / second).write_bytes(held)


def read_rows(cache):
    return cache.read_rows(torch.arange(4).numpy())


def one_epoch(cache, **options):
    return list(SoftTargetLoader(cache, batch_size=4, **options))


PATHS = {
    "read_rows": read_rows,
    "read": lambda cache: cache.read(cache.example_ids[:4]),
    "hold_in_memory": lambda cache: cache.hold_in_memory(),
    "loader in memory": lambda cache: one_epoch(cache, tier="memory"),
    "loader in windows": lambda cache: one_epoch(cache, tier="windows", shuffle="windowed"),
    "loader, scattered": lambda cache: one_epoch(cache, tier="scattered"),
}


@pytest.fixture(params=PATHS)
def read_through(request):
    return PATHS[request.param]


def test_two_shards_in_each_others_place_are_refused(folder, read_through):
    swap(folder, SHARD.format(0), SHARD.format(1))
    with pytest.raises(CorruptCacheError, match=r"codes/c/[01]/0: a chunk is sound, but not the one that .* names"):
        read_through(open_cache(folder))


def test_another_teachers_shard_is_refused(folder, read_through):
    shutil.copy(folder / "teachers/b/codes/c/0/0", folder / SHARD.format(0))
    with pytest.raises(CorruptCacheError, match=r"codes/c/0/0: a chunk is sound, but not the one that .* names"):
        read_through(open_cache(folder))


def test_a_copy_to_map_takes_no_other_shard(folder, tmp_path):
    swap(folder, SHARD.format(0), SHARD.format(1))
    with pytest.raises(CorruptCacheError, match="a chunk is sound, but not the one"):
        open_cache(folder).copy_to(tmp_path / "copy")


def test_shards_in_each_others_place_with_their_records_are_refused(folder, read_through):
    swap(folder, SHARD.format(0), SHARD.format(1))
    swap(folder, RECORD.format(0), RECORD.format(1))
    with pytest.raises(CorruptCacheError, match=r"commits/a/[01]\.json: the record cannot be read"):
        read_through(open_cache(folder))


def test_a_shard_without_its_record_is_refused(folder, read_through):
    (folder / RECORD.format(0)).unlink()
    with pytest.raises(CorruptCacheError, match=r"commits/a/0\.json: the record is missing"):
        read_through(open_cache(folder))


def test_a_record_with_another_number_of_chunks_is_refused(folder, read_through):
    record = json.loads((folder / RECORD.format(0)).read_text())
    record["chunk_checksums"] = record["chunk_checksums"][:-8]
    (folder / RECORD.format(0)).write_text(json.dumps(record))
    with pytest.raises(CorruptCacheError, match=r"commits/a/0\.json: the record names \d+ chunks"):
        read_through(open_cache(folder))


def test_records_of_earlier_releases_are_read(folder, read_through):
    for path in (folder / "commits").rglob("*.json"):
        record = json.loads(path.read_text())
        del record["chunk_checksums"]
        path.write_text(json.dumps(record))
    assert read_through(open_cache(folder)) is not None


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A cache of the same shape: other inputs, other weights, another codec."""
    folder = tmp_path_factory.mktemp("other") / "cache"
    inputs = torch.randn(NUM_EXAMPLES, 4, generator=torch.Generator().manual_seed(99))
    build_tiny(folder, TransferSet.from_arrays(inputs), tiny_teachers(2), codec=Codes())
    return folder


@pytest.mark.parametrize("name", ["teachers/b/zarr.json", "plans/0.json", "zarr.json"])
def test_another_caches_document_is_refused_at_opening(folder, other, name):
    shutil.copy(other / name, folder / name)
    with pytest.raises(CorruptCacheError, match=rf"{name} is not what complete.json vouches for"):
        open_cache(folder)
