"""Arrays of codes whose metadata an earlier release wrote: read, resumed, and told apart from altered ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from write_caches import CODECS, NAMES, Table, logits

import kdcache
from kdcache.errors import CorruptCacheError

SPECTRAL = Path(__file__).parent / "v1" / "spectral"
CODES = "teachers/b/codes"
EARLIER = {"clevel": 5, "blocksize": 65536}
PRESENT = {"clevel": 8, "blocksize": 131072}


@pytest.fixture
def earlier(tmp_path):
    return Path(shutil.copytree(SPECTRAL, tmp_path / "cache"))


def compression_of(cache):
    metadata = json.loads((cache / CODES / "zarr.json").read_bytes())
    stated = metadata["codecs"][0]["configuration"]["codecs"][2]["configuration"]
    return {name: stated[name] for name in EARLIER}


def state(cache, **changes):
    file = cache / CODES / "zarr.json"
    metadata = json.loads(file.read_bytes())
    metadata["codecs"][0]["configuration"]["codecs"][2]["configuration"].update(changes)
    file.write_text(json.dumps(metadata))


def build(cache):
    transfer_set = kdcache.TransferSet.from_arrays(
        torch.arange(12), labels=[index % 5 for index in range(12)], example_ids=NAMES
    )
    teachers = {"a": Table(0, masked=False), "b": Table(1, masked=False)}
    kdcache.build_cache(cache, transfer_set, teachers, codec=CODECS["spectral"], shard_rows=8, chunk_rows=4)


def test_the_golden_cache_has_the_earlier_compression(earlier):
    assert compression_of(earlier) == EARLIER


def test_new_caches_have_the_present_compression(tmp_path):
    build(tmp_path / "new")
    assert compression_of(tmp_path / "new") == PRESENT


def test_a_build_that_an_earlier_release_began_goes_on(earlier, monkeypatch):
    monkeypatch.setattr(Table, "__module__", "__main__")  # as it was called when the golden caches were written
    (earlier / "complete.json").unlink()
    (earlier / CODES / "c" / "1" / "0").unlink()
    (earlier / "commits" / "b" / "1.json").unlink()
    build(earlier)
    assert compression_of(earlier) == EARLIER
    assert kdcache.verify_cache(earlier).is_sound
    read = kdcache.open_cache(earlier).read(NAMES).probabilities(2.0, teachers=["b"])
    expected = torch.softmax(logits(1, masked=False) / 2.0, dim=1)
    torch.testing.assert_close(read, expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("changes", [{"clevel": 6}, {"blocksize": 131072}, {"shuffle": "shuffle"}])
def test_a_compression_that_no_release_wrote_is_refused(earlier, changes):
    state(earlier, **changes)
    with pytest.raises(CorruptCacheError, match="not as the documents say"):
        kdcache.open_cache(earlier).read(NAMES, teachers=["b"])
