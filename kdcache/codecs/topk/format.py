"""The stored form of the topk codec: its columns, and how whole numbers are written in them."""

from __future__ import annotations

__all__ = [
    "EMPTY",
    "FAR_NODE_STEP",
    "LARGEST_SIGNED",
    "NODE_STEP",
    "THRESHOLD_STEP",
    "columns_of",
    "deltas",
    "ranks",
    "signed",
    "zigzag",
]

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdcache.codecs.topk.columns import LARGEST_CODE, Columns
from kdcache.codecs.topk.tail import NUM_FAR_GROUPS
from kdcache.documents.codec_specs import TopK

EMPTY = LARGEST_CODE
"""Gap code of a place without a class."""

NODE_STEP = 2.0**-9
"""Step of the coefficients of the near classes' log-partition."""

THRESHOLD_STEP = 2.0**-5
"""Step of the threshold of inclusion probabilities, in logits."""

FAR_NODE_STEP = 2.0**-10
"""Step of the coefficients of a far group's log-partition."""

LARGEST_SIGNED = LARGEST_CODE // 2
"""Largest absolute value of a signed number."""


def columns_of(spec: TopK, num_classes: int) -> Columns:
    """Lay out the columns of a row; see `TopKCodec`."""
    num_kept = min(spec.k, num_classes)
    widths = {"kept_class": num_kept, "kept_gap": num_kept, "node": spec.num_nodes}
    widths |= {"far_count": NUM_FAR_GROUPS, "far_gap": NUM_FAR_GROUPS, "far_node": NUM_FAR_GROUPS * spec.num_nodes}
    numbers: tuple[str, ...] = ("kept_class", "far_count")
    if spec.tail == "samples":
        num_drawn = min(spec.num_samples, num_classes - num_kept)
        widths |= {"masked_count": 1, "threshold": 1, "drawn_class": num_drawn, "drawn_gap": num_drawn}
        numbers = (*numbers, "masked_count", "drawn_class")
    return Columns(widths, high=numbers if num_classes > LARGEST_CODE + 1 else ())


def ranks(deltas: Int64[Tensor, "row place"]) -> Int64[Tensor, "row place"]:
    """Give the ranks of `deltas`."""
    return (deltas + 1).cumsum(dim=1) - 1


def deltas(ranks: Int64[Tensor, "row place"]) -> Int64[Tensor, "row place"]:
    """Give rising ranks as their distances less 1, and 0 or more in the empty places at the end."""
    return ranks.diff(dim=1, prepend=torch.full_like(ranks[:, :1], -1)).sub_(1).clamp_(min=0)


def zigzag(numbers: Float[Tensor, ...]) -> Int64[Tensor, ...]:
    """Give whole numbers of float type, clamped, as 0, 1, 2, 3, ... for 0, -1, 1, -2, ...."""
    clamped = numbers.clamp(-LARGEST_SIGNED, LARGEST_SIGNED).to(torch.int64)
    return torch.where(clamped < 0, -2 * clamped - 1, 2 * clamped)


def signed(numbers: Int64[Tensor, ...]) -> Int64[Tensor, ...]:
    """Give the numbers that `zigzag` wrote."""
    return torch.where(numbers % 2 == 1, -(numbers // 2) - 1, numbers // 2)
