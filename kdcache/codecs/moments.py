"""Weighted moments of the errors of many rows, and the bounds on KL that follow from them.

`kdcache.codecs.bounds` derives the bounds; this module holds the sums and the arithmetic that both of their makers
share, with room for what rounding can hide.
"""

from __future__ import annotations

__all__ = ["ErrorMoments"]

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from kdcache.documents.record import BOUND_TEMPERATURES

_ROUNDED_TWICE = 1 + 1e-9


@dataclass(frozen=True, eq=False)
class ErrorMoments:
    """Sums over the classes of all rows; d = error - centre, z = logit - a number of the row's own.

    Attributes
    ----------
    moments : Tensor [moment, row, temperature] float64
        1, z, d and d^2 summed with the weights exp(z / T) at T = 1, 2, 4, infinite.
    highest, lowest : Tensor [row] float64
        Of d.
    is_unlike : Tensor [row] bool
        Whether classes are masked on one side only.
    centre : Tensor [row, 1]
        Of the type that classes are worked on in.
    num_classes, columns_at_once : int
        Classes, and how many of them are summed in that type before float64 takes the sum.
    """

    moments: Float64[Tensor, "moment row temperature"]
    highest: Float64[Tensor, " row"]
    lowest: Float64[Tensor, " row"]
    is_unlike: Bool[Tensor, " row"]
    centre: Float[Tensor, "row 1"]
    num_classes: int
    columns_at_once: int

    @classmethod
    def empty(cls, num_rows: int, num_classes: int, columns_at_once: int, like: Tensor) -> ErrorMoments:
        """Start the sums; `like` has the type and device that classes are worked on in."""
        return cls(
            moments=like.new_zeros(4, num_rows, 4, dtype=torch.float64),
            highest=like.new_full((num_rows,), -torch.inf, dtype=torch.float64),
            lowest=like.new_full((num_rows,), torch.inf, dtype=torch.float64),
            is_unlike=like.new_zeros(num_rows, dtype=torch.bool),
            centre=like.new_zeros(num_rows, 1),
            num_classes=num_classes,
            columns_at_once=columns_at_once,
        )

    def scaled_bounds(
        self, *, error_margin: Tensor | None = None, logit_margin: Tensor | None = None
    ) -> Float64[Tensor, "row interval"]:
        """Give the bounds, with room for what rounding can hide.

        With eps half a unit in the last place: a sum of n terms of one sign is off by n eps at most in any order, for
        signed terms of their absolute sum, and tiles are added in float64; a weight exp(z / T) is off by (|z| / T + 11)
        eps, and |z| / T is below 750 where it does not underflow; a ratio doubles both. An error d is off by eps (|e| +
        |d|), which adds to the root of a second moment at most (Minkowski). What underflows is below the smallest
        normal number, class by class, against a sum of weights that is 1 at least.

        Parameters
        ----------
        error_margin : Tensor [row], optional
            What an error may be off by besides, where errors come from products in a reduced precision.
        logit_margin : Tensor [row], optional
            The same of logits: weights are then off by a factor exp(margin / T) each way, and their sum too.
        """
        info = torch.finfo(self.centre.dtype)
        relative = info.eps / 2 * (2.1 * min(self.num_classes, self.columns_at_once) + 1700)
        lost = 4.0 * self.num_classes * info.tiny
        largest = torch.maximum(self.highest.abs(), self.lowest.abs())[:, None]
        error = 1.1 * info.eps / 2 * (self.centre.double().abs() + 2 * largest)
        if error_margin is not None:
            error = error + error_margin.double()[:, None]
        depth, offset, square = self.moments[1:] / self.moments[0]
        middle = offset[:, :3]
        starts = torch.tensor(BOUND_TEMPERATURES, dtype=torch.float64, device=offset.device)
        inverse = torch.cat([1 / starts, starts.new_zeros(1)])
        gaps = -inverse.diff()
        margin = offset.new_zeros(len(offset), 1) if logit_margin is None else logit_margin.double()[:, None]
        doubt = 2 * margin * inverse  # log of the factor that a mean over classes may be off by

        def log_second_moment(ends: slice) -> Tensor:
            rounding = relative * (square[:, ends].sqrt() + middle.abs()) ** 2 + lost * (1 + largest**2)
            second = (square[:, ends] - 2 * middle * offset[:, ends] + middle**2).clamp(min=0) + rounding
            return 2 * torch.log(second.sqrt() + error) + doubt[:, ends]

        near, far = depth[:, :3], depth[:, 1:]
        slack = relative * (near.abs() + far.abs()) + 1000 * lost
        slack = slack + 2 * margin + torch.expm1(doubt[:, :3]) * near.abs() + torch.expm1(doubt[:, 1:]) * far.abs()
        jeffreys = gaps * ((near - far).clamp(min=0) + slack)
        log_moment = _largest_between(log_second_moment(slice(0, 3)), log_second_moment(slice(1, 4)), jeffreys)
        bounds = _bennett_factor((self.highest[:, None] - middle + error).clamp(min=0) / starts) * log_moment.exp()
        hoeffding = self.error_range()[:, None].add(2 * error) ** 2 / 8
        # NaN here is a number that overflowed, or a row that holds NaN: Hoeffding's bound is NaN in the latter alone
        bounds = torch.minimum(bounds.nan_to_num(nan=torch.inf, posinf=torch.inf), hoeffding)
        bounds[self.is_unlike] = torch.inf
        return bounds * _ROUNDED_TWICE

    def error_range(self) -> Float64[Tensor, " row"]:
        """Give the spread of each row's errors over its classes."""
        return self.highest - self.lowest


def _bennett_factor(largest: Tensor) -> Tensor:
    """Give (exp(b) - 1 - b) / b^2 for b >= 0, from above; 1/2 at 0, infinite where it overflows."""
    series = 0.5 + largest / 6 + largest**2 / 24 + largest**3 / 100
    return torch.where(largest < 0.01, series, (torch.expm1(largest) - largest) / largest**2)


def _largest_between(near: Tensor, far: Tensor, jeffreys: Tensor) -> Tensor:
    """Give the largest a near + (1 - a) far + a (1 - a) jeffreys over a in [0, 1]."""
    share = ((near - far + jeffreys) / (2 * jeffreys).clamp(min=1e-300)).clamp(0, 1)
    return share * near + (1 - share) * far + share * (1 - share) * jeffreys
