"""Blocks and tiles of an accelerator's size give what those of a processor's size give."""

from __future__ import annotations

import torch

from kdcache.codecs import base, row_errors
from kdcache.codecs.row_errors import ErrorSums
from kdcache.codecs.topk import TopKCodec
from kdcache.documents import TopK


def test_topk_codes_do_not_depend_on_the_block(monkeypatch):
    logits = 3 * torch.randn(300, 2000, generator=torch.Generator().manual_seed(0))
    codec = TopKCodec(TopK(k=4), num_classes=2000)
    parameters = base.parameters_to(codec.fit(logits), "cpu")
    small = codec.encode(logits, parameters)
    monkeypatch.setattr(base, "BLOCK_ELEMENTS", base.BLOCK_ELEMENTS_ON_DEVICE)
    assert torch.equal(codec.encode(logits, parameters).int(), small.int())


def kl_of_tiles(logits, errors):
    sums = ErrorSums(logits.amax(dim=1), torch.zeros(len(logits)), logits.shape[1])
    for place, true, offsets in sums.tiles(slice(0, logits.shape[1])):
        true.copy_(logits[:, place] / 4)
        offsets.copy_(errors[:, place] / 4)
    return sums.row_errors().kl


def test_errors_of_rows_do_not_depend_on_the_tile(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits, errors = 3 * torch.randn(40, 9000, generator=generator), 0.2 * torch.randn(40, 9000, generator=generator)
    small = kl_of_tiles(logits, errors)
    monkeypatch.setattr(row_errors, "TILE_COLUMNS", row_errors.TILE_COLUMNS_ON_DEVICE)
    torch.testing.assert_close(kl_of_tiles(logits, errors), small, rtol=1e-3, atol=2e-6)


def test_an_accelerator_gets_larger_blocks_and_tiles():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert base.block_elements(cuda) > base.block_elements(cpu)
    assert row_errors.tile_rows(cuda) > row_errors.tile_rows(cpu)
