import pytest
import torch

from kdcache.build.masks import count_other_masks


@pytest.mark.parametrize(("num_masking", "expected"), [(0, 0), (3, 3), (97, 3), (100, 0)])
def test_rows_are_counted_that_mask_other_classes_than_most(num_masking, expected):
    logits = torch.zeros(100, 5)
    logits[:num_masking, 2] = -torch.inf
    assert count_other_masks(logits) == expected


def test_masks_are_counted_block_by_block(monkeypatch):
    monkeypatch.setattr("kdcache.build.masks._BLOCK_ELEMENTS", 10)
    test_rows_are_counted_that_mask_other_classes_than_most(97, 3)
