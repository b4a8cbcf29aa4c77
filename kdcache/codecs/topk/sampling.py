"""Sampling without replacement with stated inclusion probabilities, as a pure function of a row and a seed.

*Systematic sampling* lays the inclusion probabilities end to end and keeps every class whose stretch holds one of the
points u, u + 1, u + 2, ...: with u uniform in [0, 1), a class is kept with exactly its probability (Madow 1949).
"""

from __future__ import annotations

__all__ = ["inclusion_probabilities", "systematic_sample", "thresholds", "uniforms"]

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

_LOW_31 = 2**31 - 1
_LOW_22 = 2**22 - 1


def inclusion_probabilities(
    gaps: Float[Tensor, "row class"], threshold: Float64[Tensor, " row"], temperature: float
) -> Float[Tensor, "row class"]:
    """Give min(1, exp((threshold - gap) / temperature)): proportional to the soft targets, capped at 1."""
    return (threshold.to(gaps.dtype)[:, None] - gaps).div_(temperature).exp_().clamp_(max=1)


def thresholds(gaps: Float32[Tensor, "row class"], num_samples: int, temperature: float) -> Float64[Tensor, " row"]:
    """Find for each row the threshold at which `num_samples` classes are kept on average.

    Parameters
    ----------
    gaps : Tensor [row, class]
        float32; infinite for a class that must not be kept.
    num_samples : int
        Classes wanted.
    temperature : float
        Of the sampling.

    Returns
    -------
    Tensor [row]
        float64, exact to about 1e-6; infinite where no more than `num_samples` gaps are finite, so that all are kept.

    Notes
    -----
    Starting without caps, the classes that reach probability 1 are set aside and the rest is scaled up again, until no
    other class reaches 1. The threshold only rises.
    """
    num_finite = (gaps < torch.inf).sum(dim=1, keepdim=True)
    all_kept = num_finite <= num_samples
    nearest = gaps.amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    exponents = (nearest - gaps).div_(temperature)
    log_rest = torch.logsumexp(exponents, dim=1, keepdim=True)
    log_scale = torch.full_like(nearest, -torch.inf)
    num_capped = torch.zeros_like(num_finite)
    while True:
        risen = torch.maximum(log_scale, (num_samples - num_capped).log() - log_rest)
        log_scale = torch.where(all_kept, torch.inf, risen)
        capped = exponents >= -log_scale
        now_capped = capped.sum(dim=1, keepdim=True)
        if bool((all_kept | (now_capped == num_capped)).all()):
            return (nearest + temperature * log_scale).to(torch.float64)[:, 0]
        num_capped = now_capped
        log_rest = torch.logsumexp(exponents.masked_fill(capped, -torch.inf), dim=1, keepdim=True)


def uniforms(content: Int64[Tensor, "row number"], seed: int) -> Float64[Tensor, " row"]:
    """Give each row a number in [0, 1) that looks uniform and depends on nothing but its content and the seed.

    Every number is mixed and multiplied by an odd number of its place's own; the sum, folded, is mixed with the seed.
    Nothing passes 63 bits, so that every device counts alike.

    Parameters
    ----------
    content : Tensor [row, number]
        int64, from 0 to 2^31 - 1; fewer than 2^19 a row.
    seed : int
        From 0 to 2^31 - 1.
    """
    factors = _mixed(torch.arange(1, content.shape[1] + 1, device=content.device)) | 1
    sums = (_mixed(content) * factors >> 18).sum(dim=1)
    low, high = sums & _LOW_31, sums >> 31 & _LOW_31
    first = _mixed(_mixed(low ^ _mixed(torch.full_like(low, seed))) ^ high)
    second = _mixed(first ^ low) & _LOW_22
    return first.to(torch.float64) * 2.0**-31 + second.to(torch.float64) * 2.0**-53


def systematic_sample(
    probabilities: Float32[Tensor, "row class"], uniform: Float64[Tensor, " row"], num_samples: int
) -> Int64[Tensor, "row sample"]:
    """Draw classes with the given inclusion probabilities.

    Parameters
    ----------
    probabilities : Tensor [row, class]
        float32; their sum is at most `num_samples`. They are added up in float64.
    uniform : Tensor [row]
        float64, in [0, 1).
    num_samples : int
        Classes drawn at most. A row draws the whole part of its sum of probabilities, or one more.

    Returns
    -------
    Tensor [row, sample]
        int64, rising; places that stay empty hold the number of classes.
    """
    points = torch.arange(1, num_samples + 1, device=uniform.device) - uniform[:, None]
    return torch.searchsorted(probabilities.cumsum(dim=1, dtype=torch.float64), points)


def _mixed(numbers: Tensor) -> Tensor:
    """Mix numbers below 2^31 one to one, by odd multiplications and shifted exclusive ors."""
    numbers = (numbers ^ (numbers >> 16)) * 0x5EBCA6B & _LOW_31
    numbers = (numbers ^ (numbers >> 13)) * 0x42B2AE35 & _LOW_31
    return numbers ^ (numbers >> 16)
