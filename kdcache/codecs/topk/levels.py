"""Levels of gaps whose spacing widens with the gap."""

from __future__ import annotations

__all__ = ["Levels"]

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Shaped
from torch import Tensor

from kdcache.codecs.topk.columns import LARGEST_CODE

_LAST_CODE = LARGEST_CODE - 1
_WIDENING = 8.0


@dataclass(frozen=True)
class Levels:
    """Level c is x (1 + x / 8) with x = step c, for codes c from 0 to 65,533.

    The spacing grows from one step at gap 0 to twice that at 6 logits and three times at 16: logits are resolved where
    the probability is, and with a step of 1/8 the codes reach 8.4 million logits.

    Parameters
    ----------
    step : float
        Spacing of the first levels, in logits.
    """

    step: float

    @property
    def last(self) -> float:
        """The largest level."""
        distance = self.step * _LAST_CODE
        return distance * (1 + distance / _WIDENING)

    def gaps(self, codes: Shaped[Tensor, ...]) -> Float64[Tensor, ...]:
        """Give the levels of codes."""
        return _risen(codes.to(torch.float64) * self.step)

    def nearest(self, gaps: Float[Tensor, ...]) -> Float32[Tensor, ...]:
        """Give the codes of the nearest levels, whole numbers of type float32; a gap beyond the last has the last."""
        gaps = gaps.clamp(max=self.last)
        lower = (gaps * (4 / _WIDENING)).add_(1).sqrt_().add_(1).reciprocal_().mul_(gaps).mul_(2 / self.step)
        lower = lower.floor_().clamp_(max=_LAST_CODE - 1)
        below = gaps - _risen(lower * self.step)
        above = _risen((lower + 1) * self.step).sub_(gaps)
        return lower.add_(above < below)

    def rounded(self, gaps: Float32[Tensor, ...]) -> Float32[Tensor, ...]:
        """Give the nearest levels of gaps; infinite ones stay so."""
        return _risen(self.nearest(gaps) * self.step).masked_fill_(gaps == torch.inf, torch.inf)


def _risen(distances: Tensor) -> Tensor:
    return (distances / _WIDENING).add_(1).mul_(distances)
