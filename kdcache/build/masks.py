"""Masks of a pilot: whether its rows mask the same classes, which a basis and class means need."""

from __future__ import annotations

__all__ = ["count_other_masks"]

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.codecs.base import row_blocks

_BLOCK_ELEMENTS = 2**22


def count_other_masks(logits: Float[Tensor, "row class"]) -> int:
    """Count the rows that mask (-inf) other classes than most rows do.

    Examples
    --------
    >>> count_other_masks(torch.tensor([[0.0, 1.0], [2.0, 1.0], [3.0, -torch.inf]]))
    1
    """
    blocks = list(row_blocks(*logits.shape, max_elements=_BLOCK_ELEMENTS))
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    for block in blocks:
        counts += logits[block].isneginf().sum(dim=0)
    if not bool(counts.any()):
        return 0
    usual = counts * 2 > len(logits)
    return sum(int((logits[block].isneginf() != usual).any(dim=1).sum()) for block in blocks)
