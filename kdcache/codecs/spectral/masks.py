"""Masked classes of the spectral codec: one mask for all rows, that of the pilot, left out before anything is coded."""

from __future__ import annotations

__all__ = ["as_index", "opened"]

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from kdcache.codecs.base import row_blocks
from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.errors import CodecError

_BLOCK_ELEMENTS = 2**24


def opened(logits: Logits, parameters: Mapping[str, Tensor]) -> Logits:
    """Leave masked classes out of logits; rows that mask others are refused."""
    if "is_open" not in parameters:
        return logits
    is_open = parameters["is_open"]
    if isinstance(logits, HeadLogits):
        return logits.of_classes(is_open)
    for block in row_blocks(*logits.shape, max_elements=_BLOCK_ELEMENTS):
        wrong = ((logits[block] == -torch.inf) == is_open).any(dim=1)
        if bool(wrong.any()):
            raise CodecError(
                f"Row {block.start + int(wrong.nonzero()[0])} masks other classes (-inf) than the pilot did, and the "
                "spectral codec keeps one mask for all rows. Use Codes() or Lossless(), which keep a mask a row. "
                "None of these rows was encoded."
            )
    return logits[:, as_index(is_open)]


def as_index(is_open: Bool[Tensor, " class"]) -> slice | Tensor:
    """Give the classes that are not masked: a slice where they stand together, since picking others copies them."""
    places = is_open.nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
