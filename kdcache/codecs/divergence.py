"""KL of many rows at temperatures 1, 2 and 4, quickly: one exponential serves all three."""

from __future__ import annotations

__all__ = ["TEMPERATURES", "divergences"]

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcache.codecs.base import row_blocks
from kdcache.codecs.certificate import measure

TEMPERATURES: tuple[float, ...] = (1.0, 2.0, 4.0)
"""Temperatures at which a target for KL is held: above 4 the KL of logit errors falls as 1 / temperature^2."""

_PRECISE_CLASSES = 4096
_BLOCK_ELEMENTS = 2**18


def divergences(
    logits: Float[Tensor, "row class"], decoded: Float[Tensor, "row class"], *, smallest: float = 1e-3
) -> Float64[Tensor, "row temperature"]:
    """Measure KL(teacher || decoded) of each row at temperatures 1, 2 and 4.

    With v = exp(z / 4) the weights at temperature 4, 2 and 1 are v, v^2 and v^4, so that one exponential of each array
    serves all three. KL = log sum_i u_i - log sum_i v_i - E(error) / temperature, in float32: exact to about 1e-6 nats.
    Where the KL asked for (`smallest`) is not large against that, or there are few classes, `measure` is used.

    Parameters
    ----------
    logits, decoded : Tensor [row, class]
        Finite; a row may be shifted.
    smallest : float, default 1e-3
        The smallest KL that must be told apart, in nats.

    Returns
    -------
    Tensor [row, temperature]
        In nats, at least 0.
    """
    if logits.shape[1] <= _PRECISE_CLASSES or smallest < 1e-3:
        return measure(logits, decoded, TEMPERATURES)
    found = torch.empty(len(logits), len(TEMPERATURES), dtype=torch.float64, device=logits.device)
    for block in row_blocks(*logits.shape, max_elements=_BLOCK_ELEMENTS):
        found[block] = _block(logits[block].to(torch.float32), decoded[block].to(torch.float32))
    return found


def _block(logits: Tensor, decoded: Tensor) -> Tensor:
    true = logits - logits.amax(dim=1, keepdim=True)
    coded = decoded - decoded.amax(dim=1, keepdim=True)
    weights = [torch.exp(true / 4)]
    others = [torch.exp(coded / 4)]
    for powers in (weights, others):
        powers.append(powers[0] * powers[0])
        powers.append(powers[1] * powers[1])
    errors = coded.sub_(true)
    scratch = torch.empty_like(errors)
    columns = []
    for temperature, p, q in zip((4.0, 2.0, 1.0), weights, others, strict=True):
        total = p.sum(dim=1)
        mean_error = torch.mul(p, errors, out=scratch).sum(dim=1) / total
        columns.append(q.sum(dim=1).double().log() - total.double().log() - mean_error.double() / temperature)
    return torch.stack(columns[::-1], dim=1).clamp_(min=0)
