"""Caches that a released format version wrote are read by every later release."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from write_caches import CODECS, NAMES, logits

from kdcache import open_cache, verify_cache
from kdcache.stream import epoch_order

V1 = Path(__file__).parent / "v1"
PINNED_FIRST = [7, 6, 1, 5, 3, 8, 0, 2, 9, 4]
PINNED_SECOND = [7, 4, 3, 9, 6, 5, 2, 1, 0, 8]


@pytest.fixture(params=sorted(CODECS))
def cache(request):
    return open_cache(V1 / request.param)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_version_1_gives_the_soft_targets_it_was_written_with(cache, temperature):
    read = cache.read(NAMES[::-1]).probabilities(temperature, teachers=["b"])
    expected = torch.softmax(logits(1).flip(0) / temperature, dim=1)
    allowed = cache.certificate(temperature).total_variation_bound + 1e-6
    assert float((read - expected).abs().sum(dim=1).max()) / 2 <= allowed


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
