"""The log-partition of a row's tail at every temperature, as a short polynomial and a single far class.

The *tail* are the classes that a codec does not keep one by one. A *tail gap* is how far below a reference logit of its
row a class lies; infinite gaps stand for classes that are not in the tail. `beta` is 1 / temperature.
"""

from __future__ import annotations

__all__ = ["FAR_GAP", "HIGHEST_BETA", "LogPartition", "Tail", "separated", "without"]

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

HIGHEST_BETA = 10 / 7
"""Upper end of the range in which the log-partition is interpolated: temperature 0.7."""

FAR_GAP = 64.0
"""Tail gap beyond which a class is far: its weight is e^-64 of the reference's at temperature 1, e^-8 at 8."""

_FAR_BETA = 1 / 8
_NEAREST_GAP = -8.0  # levels hundreds of logits below a row's maximum lie so far apart that gaps fall below them


@dataclass(frozen=True)
class Tail:
    """The tails of rows, split into near classes and far ones."""

    reference: Float64[Tensor, " row"]
    """Gap to the row's maximum from which tail gaps are counted."""
    near: Float32[Tensor, "row class"]
    """Tail gaps of the near classes, infinite for all others."""
    near_sum: Float32[Tensor, " row"]
    """Sum of the near tail gaps."""
    num_near: Int64[Tensor, " row"]
    """Near classes: at most 64 logits below the reference."""
    num_far: Int64[Tensor, " row"]
    """Classes below those that are not masked."""
    far_gap: Float64[Tensor, " row"]
    """Tail gap of a class that weighs as much at temperature 8 as the mean far class; 0 where there is none."""


def separated(
    gaps: Float32[Tensor, "row class"], classes: Int64[Tensor, "row place"], reference: Float[Tensor, " row"]
) -> Tail:
    """Take the tails out of rows.

    Parameters
    ----------
    gaps : Tensor [row, class]
        Gaps to the row's maximum, infinite for masked classes.
    classes : Tensor [row, place]
        Classes that are not in the tail; places without one hold the number of classes.
    reference : Tensor [row]
        Gap from which tail gaps are counted.
    """
    tail = (gaps - reference.to(gaps.dtype)[:, None]).clamp_(min=_NEAREST_GAP)
    tail = without(tail, classes, value=0.0)
    reference = reference.to(torch.float64)
    none = torch.zeros_like(classes[:, 0])
    if bool(tail.amax() <= FAR_GAP):
        near_sum = tail.sum(dim=1)
        num_near = gaps.shape[1] - (classes < gaps.shape[1]).sum(dim=1)
        return Tail(reference, without(tail, classes), near_sum, num_near, none, torch.zeros_like(reference))
    tail = without(tail, classes)
    is_far = tail > FAR_GAP
    near, far = tail.masked_fill(is_far, torch.inf), tail.masked_fill(~is_far, torch.inf)
    num_near = is_far.logical_not().sum(dim=1)
    num_far = (far < torch.inf).sum(dim=1)
    log_sum = torch.logsumexp(far.to(torch.float64) * -_FAR_BETA, dim=1)
    far_gap = torch.where(num_far > 0, (num_far.to(torch.float64).log() - log_sum) / _FAR_BETA, 0.0)
    return Tail(reference, near, tail.masked_fill(is_far, 0).sum(dim=1), num_near, num_far, far_gap)


def without(
    values: Float[Tensor, "row class"], classes: Int64[Tensor, "row place"], *, value: float = math.inf
) -> Float[Tensor, "row class"]:
    """Overwrite the values of classes, in place; places without a class hold the number of classes."""
    inside = torch.where(classes < values.shape[1], classes, classes[:, :1])
    return values.scatter_(1, inside, value)


@dataclass(frozen=True)
class LogPartition:
    """F(beta) = log mean of exp(-beta gap) over a row's near tail classes, as beta times a Chebyshev polynomial.

    F is 0 at beta = 0, falling and convex. What is interpolated is F(beta) / beta on [0, 10/7], at the Chebyshev points
    of the second kind (Trefethen, Approximation Theory and Approximation Practice, chapter 2). The last of them is
    beta = 0, where F(beta) / beta is minus the mean gap. The coefficients shrink quickly, so few bits hold them. Above
    10/7, F is continued along its tangent.

    Parameters
    ----------
    num_nodes : int
        Points of interpolation, and coefficients; at least 2.
    """

    num_nodes: int

    @cached_property
    def betas(self) -> tuple[float, ...]:
        """The points of interpolation, falling from 10/7 to 0."""
        last = self.num_nodes - 1
        return (*(HIGHEST_BETA * (1 + math.cos(math.pi * index / last)) / 2 for index in range(last)), 0.0)

    def fit(self, tail: Tail) -> Float64[Tensor, "row node"]:
        """Give the coefficients; all 0 for a row without near classes."""
        count = tail.num_near.clamp(min=1).to(torch.float64)
        totals = torch.stack([tail.near.mul(-beta).exp_().sum(dim=1) for beta in self.betas[:-1]], dim=1)
        slopes = (totals.to(torch.float64) / count[:, None]).log() / totals.new_tensor(self.betas[:-1])
        values = torch.cat([slopes, -(tail.near_sum / count)[:, None]], dim=1)
        values = torch.where(tail.num_near[:, None] > 0, values, 0.0)
        points = np.cos(np.pi * np.arange(self.num_nodes) / (self.num_nodes - 1))
        matrix = np.linalg.inv(np.polynomial.chebyshev.chebvander(points, self.num_nodes - 1))
        return values @ values.new_tensor(matrix.T.tolist())

    def evaluate(self, coefficients: Float64[Tensor, "row node"], beta: float) -> Float64[Tensor, " row"]:
        """Give F(beta) of each row."""
        # in tensors throughout: a compiler would make a graph of its own of every beta that Python computes with
        here = coefficients.new_ones(()) * beta
        inside = here.clamp(max=HIGHEST_BETA)
        orders = torch.arange(self.num_nodes, dtype=coefficients.dtype, device=coefficients.device)
        angle = (2 * inside / HIGHEST_BETA - 1).clamp(-1, 1).acos()
        outside = here - inside  # the derivative of the polynomial of order n at its upper end is n^2
        return coefficients @ (here * (orders * angle).cos() + 2 * outside * orders**2)
