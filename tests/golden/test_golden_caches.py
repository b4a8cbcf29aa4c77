"""Caches that a released format version wrote are read by every later release."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from write_caches import CODECS, NAMES, UNMASKED, logits

from kdcache import open_cache, verify_cache
from kdcache.stream import epoch_order

V1 = Path(__file__).parent / "v1"
PINNED_FIRST = [7, 6, 1, 5, 3, 8, 0, 2, 9, 4]
PINNED_SECOND = [7, 4, 3, 9, 6, 5, 2, 1, 0, 8]
PINNED_TOPK = {
    "topk-class-means": [
        [0.157678470, 0.135828078, 0.231022105, 0.301309615, 0.174161717],
        [0.155162111, 0.222098529, 0.289671093, 0.161685988, 0.171382293],
    ],
    "topk-samples": [
        [0.179067045, 0.0, 0.282814592, 0.368859768, 0.179067045],
        [0.251627833, 0.222060785, 0.289621860, 0.0, 0.251627833],
    ],
}


BOUNDED = sorted(name for name in CODECS if not name.startswith("topk"))
MASKED = sorted(set(BOUNDED) - set(UNMASKED))
TOPK = sorted(name for name in CODECS if name.startswith("topk"))


@pytest.fixture(params=sorted(CODECS))
def cache(request):
    return open_cache(V1 / request.param)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("cache", BOUNDED, indirect=True)
def test_version_1_gives_the_soft_targets_it_was_written_with(cache, temperature):
    read = cache.read(NAMES[::-1]).probabilities(temperature, teachers=["b"])
    true = logits(1, masked=Path(cache.address).name not in UNMASKED)
    expected = torch.softmax(true.flip(0) / temperature, dim=1)
    allowed = cache.certificate(temperature).total_variation_bound + 1e-6
    assert float((read - expected).abs().sum(dim=1).max()) / 2 <= allowed


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("cache", TOPK, indirect=True)
def test_version_1_gives_the_largest_probabilities_it_was_written_with(cache, temperature):
    read = cache.read(NAMES).probabilities(temperature, teachers=["b"])
    true = logits(1, masked=Path(cache.address).name not in UNMASKED)
    kept = true.sort(dim=1, descending=True, stable=True).indices[:, :2]  # the lowest of equal classes is kept
    expected = torch.softmax(true / temperature, dim=1)
    torch.testing.assert_close(read.gather(1, kept), expected.gather(1, kept), rtol=0.05, atol=0)


@pytest.mark.parametrize("cache", TOPK, indirect=True)
def test_version_1_of_topk_decodes_as_it_did_when_it_was_released(cache):
    read = cache.read(NAMES[:2]).probabilities(2.0, teachers=["b"])
    torch.testing.assert_close(read, torch.tensor(PINNED_TOPK[Path(cache.address).name]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cache", ["topk-samples"], indirect=True)
def test_version_1_draws_no_masked_class(cache):
    drawn = cache.read(NAMES).logits().isfinite()
    assert not drawn[torch.stack([logits(0), logits(1)], dim=1).isneginf()].any()


@pytest.mark.parametrize("cache", MASKED, indirect=True)
def test_version_1_keeps_masked_classes(cache):
    read = cache.read(NAMES).logits()
    expected = torch.stack([logits(0), logits(1)], dim=1).isneginf()
    assert expected.any()
    assert torch.equal(read.isneginf(), expected)


def test_version_1_keeps_ids_and_labels(cache):
    assert cache.example_ids.tolist() == NAMES
    assert cache.labels.tolist() == [index % 5 for index in range(12)]


def test_version_1_is_found_sound(cache):
    assert verify_cache(cache.address).is_sound


def test_the_shuffle_is_the_one_that_was_released():
    assert epoch_order(10, seed=0, epoch=0).tolist() == PINNED_FIRST
    assert epoch_order(10, seed=0, epoch=1).tolist() == PINNED_SECOND
