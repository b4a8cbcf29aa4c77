"""Rounding of a teacher's logits: which type they were rounded to, and how much noise that put on them."""

from __future__ import annotations

__all__ = ["Noise", "coarsest_dtype", "rounding_noise"]

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcache.codecs.base import row_blocks

_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}
_SMALLEST_EXPONENT = {torch.bfloat16: -125, torch.float16: -13}  # of `frexp`; below it numbers are equally far apart
_BLOCK_ELEMENTS = 2**22
_MARGIN = 2.0  # seen on logits of known rank: noise up to 1.05 of its own, components from 13 times of it


@dataclass(frozen=True, eq=False)
class Noise:
    """Variance of rounding, added up; each a sum of ulp^2 / 12, that of numbers spread evenly between two neighbours.

    Parameters
    ----------
    of_rows : Tensor [row]
        Sum over classes, each with its weight; float64.
    of_classes : Tensor [class]
        Sum over rows, times the class's weight; float64.
    """

    of_rows: Float64[Tensor, " row"]
    of_classes: Float64[Tensor, " class"]

    def largest_eigenvalues(self, axes: Float[Tensor, "component class"]) -> Float64[Tensor, " component"]:
        """Give the eigenvalue of rows^T rows that noise alone does not reach along each axis.

        Noise of one variance s^2 on n rows of m classes has singular values up to s (sqrt(n) + sqrt(m)) (Marchenko and
        Pastur 1967; Bandeira and van Handel 2016 for variances that differ): the root of the noise along the axis,
        summed over rows, plus the root of a row's noise, summed over classes. Where rows differ in their noise, it is
        the noisy ones' that counts.

        Parameters
        ----------
        axes : Tensor [component, class]
            Of length 1, in the weighted logits.
        """
        of_row = (self.of_rows.square().sum() / self.of_rows.sum().clamp(min=1e-300)).sqrt()
        along = (axes.double().square() @ self.of_classes).sqrt()
        return _MARGIN * (along + of_row) ** 2


def coarsest_dtype(logits: Float[Tensor, "row class"]) -> torch.dtype | None:
    """Find the 16-bit type that all logits were rounded to, whatever type they have now; None where there is none.

    A network that runs in bfloat16 and casts its logits to float32 at the end gives rounded logits too.

    Parameters
    ----------
    logits : Tensor [row, class]
        Of any floating-point type.
    """
    for dtype in _SIGNIFICANT_BITS:
        if logits.dtype == dtype or all(torch.equal(part.to(dtype).to(part.dtype), part) for part in _blocks(logits)):
            return dtype
    return None


def rounding_noise(logits: Float[Tensor, "row class"], weights: Float[Tensor, " class"], dtype: torch.dtype) -> Noise:
    """Add up the variance that rounding to a 16-bit type puts on weighted logits.

    Parameters
    ----------
    logits : Tensor [row, class]
        Finite.
    weights : Tensor [class]
        A class's variance counts so many times.
    dtype : torch.bfloat16 or torch.float16
        What the logits were rounded to.
    """
    of_classes = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    of_rows = []
    for part in _blocks(logits):
        exponents = torch.frexp(part.float()).exponent.clamp_(min=_SMALLEST_EXPONENT[dtype])
        variances = torch.exp2(2.0 * (exponents - _SIGNIFICANT_BITS[dtype])) / 12
        variances = variances.masked_fill_(part == 0, 0) * weights
        of_rows.append(variances.sum(dim=1, dtype=torch.float64))
        of_classes += variances.sum(dim=0, dtype=torch.float64)
    return Noise(torch.cat(of_rows), of_classes)


def _blocks(logits: Tensor) -> Iterator[Tensor]:
    for rows in row_blocks(*logits.shape, max_elements=_BLOCK_ELEMENTS):
        yield logits[rows]
