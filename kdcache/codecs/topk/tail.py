"""The log-partition of a row's tail at every temperature, as short polynomials of groups of classes.

The *tail* are the classes that a codec does not keep one by one. A *tail gap* is how far below a reference logit of its
row a class lies; infinite gaps stand for classes that are not in the tail. `beta` is 1 / temperature.
"""

from __future__ import annotations

__all__ = [
    "FAR_CODES",
    "FAR_UNIT",
    "HIGHEST_BETA",
    "NUM_FAR_GROUPS",
    "LogPartition",
    "Tail",
    "far_log_partition",
    "separated",
    "without",
]

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

HIGHEST_BETA = 10 / 7
"""Upper end of the range in which the log-partition of near classes is interpolated: temperature 0.7."""

NUM_FAR_GROUPS = 4
"""Groups of far classes that a row holds."""

FAR_CODES = 256.0
"""Codes to a doubling of the gap at which a group of far classes begins."""

FAR_UNIT = 1 / 8
"""Unit of the tail gaps of a far group, as a part of the gap at which the group begins."""

_HIGHEST_FAR_BETA = 2.0  # in units of a group: its classes then weigh e^-16 of the reference's and less
_WIDTH = 4.0  # a far group ends at so many times the gap at which it begins
_LARGEST_FAR_GAP = 31.0  # in units of a group: coefficients in steps of 2^-10 still fit
_NEAR_BOUNDS = (64.0, 16.0, 4.0)  # the first that leaves a near tail which the polynomial follows
_TOLERANCE = 1e-3  # of the estimated error, in nats
_NEAREST_GAP = -8.0  # levels hundreds of logits below a row's maximum lie so far apart that gaps fall below them


@dataclass(frozen=True)
class Tail:
    """What is stored of the tails of rows, before any rounding but that of `far_gap`."""

    reference: Float64[Tensor, " row"]
    """Gap to the row's maximum from which tail gaps are counted."""
    num_classes: Int64[Tensor, " row"]
    """Classes of the tail, near and far."""
    coefficients: Float64[Tensor, "row node"]
    """Of the near classes' log-partition."""
    far_count: Int64[Tensor, "row group"]
    """Classes of each far group; 0 where there is none."""
    far_gap: Int64[Tensor, "row group"]
    """Code of the tail gap at which a far group begins, which is 2^(code / 256); 0 where there is none."""
    far_coefficients: Float64[Tensor, "row group node"]
    """Of each far group's log-partition; 0 where there is none."""


def separated(
    gaps: Float32[Tensor, "row class"],
    classes: Int64[Tensor, "row place"],
    reference: Float[Tensor, " row"],
    *,
    num_nodes: int,
) -> Tail:
    """Take the tails out of rows, and describe them.

    Near are the classes up to 64 logits below the reference; where the polynomial cannot follow these, up to 16 or 4.
    The others fall into groups: each begins at the nearest class that is left and ends at four times its gap, and the
    last holds all that is left.

    Parameters
    ----------
    gaps : Tensor [row, class]
        Gaps to the row's maximum, infinite for masked classes.
    classes : Tensor [row, place]
        Classes that are not in the tail; places without one hold the number of classes.
    reference : Tensor [row]
        Gap from which tail gaps are counted.
    num_nodes : int
        Coefficients of each polynomial.
    """
    fitted = LogPartition(num_nodes, HIGHEST_BETA)
    tail = (gaps - reference.to(gaps.dtype)[:, None]).clamp_(min=_NEAREST_GAP)
    tail = without(tail, classes)
    head = gaps.gather(1, classes.clamp(max=gaps.shape[1] - 1))
    head = head.masked_fill(classes == gaps.shape[1], torch.inf) - reference.to(gaps.dtype)[:, None]
    coefficients = torch.zeros(len(gaps), num_nodes, dtype=torch.float64, device=gaps.device)
    bounds = torch.zeros(len(gaps), device=gaps.device)
    rows = torch.arange(len(gaps), device=gaps.device)
    for bound in _NEAR_BOUNDS:
        near = tail if len(rows) == len(tail) else tail[rows]
        near = near.masked_fill(near > bound, torch.inf)
        found = fitted.fit(near)
        coefficients[rows], bounds[rows] = found, bound
        rows = rows[_estimated_error(fitted, found, near, head[rows]) > _TOLERANCE]
        if not len(rows):
            break
    counts = (tail < torch.inf).sum(dim=1)
    far = _far_groups(tail, bounds, num_nodes)
    return Tail(reference.to(torch.float64), counts, coefficients, *far)


def _estimated_error(fitted: LogPartition, coefficients: Tensor, near: Tensor, head: Tensor) -> Tensor:
    """Estimate the error of a row's log-partition from the last coefficients and the tail's part of the row's mass."""
    count = (near < torch.inf).sum(dim=1).to(torch.float64)
    worst = torch.zeros_like(count)
    for beta in fitted.betas[:-1]:
        of_tail = count.log() + fitted.evaluate(coefficients, beta)
        of_head = torch.logsumexp(head.to(torch.float64) * -beta, dim=1)
        worst = torch.maximum(worst, beta * torch.sigmoid(of_tail - of_head))
    return worst * coefficients[:, -2:].abs().sum(dim=1)


def _far_groups(tail: Tensor, bounds: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give number, code of the first gap and coefficients of each far group."""
    shape = (len(tail), NUM_FAR_GROUPS)
    count = torch.zeros(shape, dtype=torch.int64, device=tail.device)
    code = torch.zeros_like(count)
    coefficients = torch.zeros(*shape, num_nodes, dtype=torch.float64, device=tail.device)
    rows = ((tail > bounds[:, None]) & (tail < torch.inf)).any(dim=1).nonzero()[:, 0]
    left = tail[rows]
    left = left.masked_fill_(left <= bounds[rows, None], torch.inf)
    for group in range(NUM_FAR_GROUPS):
        if not len(rows):
            break
        begin = (left.amin(dim=1).to(torch.float64).log2() * FAR_CODES).floor().to(torch.int64)
        gap = torch.exp2(begin / FAR_CODES).to(left.dtype)[:, None]
        end = gap * (_WIDTH if group + 1 < NUM_FAR_GROUPS else torch.inf)
        inside = (left <= end) & (left < torch.inf)
        scaled = ((left - gap) / (gap * FAR_UNIT)).clamp_(0, _LARGEST_FAR_GAP).masked_fill_(~inside, torch.inf)
        count[rows, group], code[rows, group] = inside.sum(dim=1), begin
        coefficients[rows, group] = LogPartition(num_nodes, _HIGHEST_FAR_BETA).fit(scaled)
        left = left.masked_fill_(inside, torch.inf)
        remaining = (left < torch.inf).any(dim=1)
        rows, left = rows[remaining], left[remaining]
    return count, code, coefficients


def far_log_partition(
    count: Int64[Tensor, "row group"],
    code: Int64[Tensor, "row group"],
    coefficients: Float64[Tensor, "row group node"],
    beta: float,
) -> Float64[Tensor, "row group"]:
    """Give the logarithm of the mass of each far group, relative to the reference; -inf where there is none.

    No class of a group weighs more than one at the gap at which it begins, whatever the polynomial says beyond its end.
    """
    gap = torch.exp2(code / FAR_CODES)
    shape = LogPartition(coefficients.shape[-1], _HIGHEST_FAR_BETA).evaluate(coefficients, beta * gap * FAR_UNIT)
    return count.to(torch.float64).log() - beta * gap + shape.clamp(max=0)


def without(
    values: Float[Tensor, "row class"], classes: Int64[Tensor, "row place"], *, value: float = math.inf
) -> Float[Tensor, "row class"]:
    """Overwrite the values of classes, in place; places without a class hold the number of classes."""
    inside = torch.where(classes < values.shape[1], classes, classes[:, :1])
    return values.scatter_(1, inside, value)


@dataclass(frozen=True)
class LogPartition:
    """F(beta) = log mean of exp(-beta gap) over classes of a row, as beta times a Chebyshev polynomial.

    F is 0 at beta = 0, falling and convex. What is interpolated is F(beta) / beta on [0, highest], at the Chebyshev
    points of the second kind (Trefethen, Approximation Theory and Approximation Practice, chapter 2). The last of them
    is beta = 0, where F(beta) / beta is minus the mean gap. The coefficients shrink quickly, so few bits hold them.
    Above the highest beta, F is continued along its tangent.

    Parameters
    ----------
    num_nodes : int
        Points of interpolation, and coefficients; at least 2.
    highest_beta : float
        Upper end of the interpolation.
    """

    num_nodes: int
    highest_beta: float

    @cached_property
    def betas(self) -> tuple[float, ...]:
        """The points of interpolation, falling from the highest to 0."""
        last = self.num_nodes - 1
        return (*(self.highest_beta * (1 + math.cos(math.pi * index / last)) / 2 for index in range(last)), 0.0)

    def fit(self, gaps: Float32[Tensor, "row class"]) -> Float64[Tensor, "row node"]:
        """Give the coefficients for the classes whose gaps are finite; all 0 for a row without any."""
        inside = gaps < torch.inf
        num_inside = inside.sum(dim=1)
        count = num_inside.clamp(min=1).to(torch.float64)
        totals = torch.stack([gaps.mul(-beta).exp_().sum(dim=1) for beta in self.betas[:-1]], dim=1)
        slopes = (totals.to(torch.float64) / count[:, None]).log() / totals.new_tensor(self.betas[:-1])
        mean = gaps.masked_fill(~inside, 0).sum(dim=1) / count
        values = torch.cat([slopes, -mean[:, None]], dim=1)
        values = torch.where(num_inside[:, None] > 0, values, 0.0)
        points = np.cos(np.pi * np.arange(self.num_nodes) / (self.num_nodes - 1))
        matrix = np.linalg.inv(np.polynomial.chebyshev.chebvander(points, self.num_nodes - 1))
        return values @ values.new_tensor(matrix.T.tolist())

    def evaluate(
        self, coefficients: Float64[Tensor, "*row node"], beta: float | Float64[Tensor, "*row"]
    ) -> Float64[Tensor, "*row"]:
        """Give F(beta) of each row, at one beta or at one of its own."""
        # in tensors throughout: a compiler would make a graph of its own of every beta that Python computes with
        here = coefficients.new_ones(()) * beta
        inside = here.clamp(max=self.highest_beta)[..., None]
        orders = torch.arange(self.num_nodes, dtype=coefficients.dtype, device=coefficients.device)
        angle = (2 * inside / self.highest_beta - 1).clamp(-1, 1).acos()
        outside = here[..., None] - inside  # the derivative of the polynomial of order n at its upper end is n^2
        return (coefficients * (here[..., None] * (orders * angle).cos() + 2 * outside * orders**2)).sum(dim=-1)
