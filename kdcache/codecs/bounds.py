"""Bounds on every row's KL at every temperature from 1 up, from one pass over its logits.

What is bounded is KL(teacher || decoded) in nats. Errors are e = decoded - logits over the classes that are not masked,
p_T is the teacher's soft targets at temperature T, and c is any number: softmax sees no shift.

*At one temperature* (Bennett 1962): KL(T) = log E exp((e - c)/T) - E (e - c)/T under p_T. As log y <= y - 1, that is
at most E g((e - c)/T) with g(x) = exp(x) - 1 - x. The ratio phi(x) = g(x) / x^2 grows with x and is 1/2 at 0, so with
b = max(0, max(e - c)) / T: T^2 KL(T) <= phi(b) E_T (e - c)^2, a bound that tends to the KL itself for small errors.

*Between two temperatures* T_i < T_j: phi(b) is largest at T_i. With 1/T = a/T_i + (1 - a)/T_j, p_T is p_i^a p_j^(1-a)
over its sum C, and Hoelder's inequality gives E_T f <= (E_i f)^a (E_j f)^(1-a) / C for any f >= 0. The log-partition is
convex in 1/T, hence above its tangents at both ends; the two, weighted a and 1 - a, give -log C <= a (1 - a) J with
J = (1/T_i - 1/T_j) (E_i z - E_j z), z the logits: the sum of the two divergences between p_i and p_j (Jeffreys). With
the second moments M_i, M_j of the errors about one c, log E_T (e - c)^2 <= a log M_i + (1 - a) log M_j + a (1 - a) J, a
concave parabola in a, largest where a = (log M_i - log M_j + J) / (2 J), or at the end next to it. The last interval
ends at 1/T = 0, where p is uniform over the classes that are not masked.

*Always* T^2 KL(T) <= R^2 / 8 with the error range R (Hoeffding 1963, lemma 1); the smaller bound counts.
"""

from __future__ import annotations

__all__ = ["BOUND_TEMPERATURES", "scaled_bounds"]

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcache.codecs.base import row_blocks
from kdcache.codecs.moments import ErrorMoments
from kdcache.documents.record import BOUND_TEMPERATURES
from kdcache.errors import ShapeError

_PRECISE_CLASSES = 4096
"""Rows of at most so many classes are bounded in float64: it costs little there."""

_TILE_COLUMNS = 2**13
_TILE_ELEMENTS = 2**16
_TILE_ELEMENTS_ON_DEVICE = 2**24


def scaled_bounds(
    logits: Float[Tensor, "row class"], decoded: Float[Tensor, "row class"]
) -> Float64[Tensor, "row interval"]:
    """Bound T^2 KL(teacher || decoded) of each row for all temperatures T of each interval.

    Intervals start at `BOUND_TEMPERATURES`; KL at T is at most the interval's number over T^2, at every T in it and at
    both its ends. Derived in this module's docstring.

    Parameters
    ----------
    logits : Tensor [row, class]
        The teacher's logits; -inf is a masked class.
    decoded : Tensor [row, class]
        The decoded logits, shifted or not, on the same device.

    Returns
    -------
    Tensor [row, interval]
        float64, in nats times temperature squared. 0 for a row without errors, infinite for one whose masked classes
        are others than the teacher's, NaN for one that holds NaN.

    Raises
    ------
    ShapeError
        The two arrays differ in shape, or have other axes than [row, class].

    Notes
    -----
    Rows of more than 4,096 classes are worked on in float32 and in blocks that a processor's cache holds, unless they
    are given in float64; rows whose numbers float32 cannot hold are done again in float64. What rounding can hide is
    added to the bound, see `ErrorMoments.scaled_bounds`: about 1% in float32, and the square of a few 1e-8 of the
    largest error, shift included.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> bounds = scaled_bounds(logits, logits + torch.tensor([[0.01, -0.01, 0.0]]))
    >>> [f"{bound:.1e}" for bound in bounds[0].tolist()]
    ['4.1e-05', '3.9e-05', '3.7e-05']
    """
    if logits.ndim != 2 or logits.shape != decoded.shape:
        raise ShapeError(
            "The teacher's and the decoded logits must have the same axes [row, class], "
            f"got {tuple(logits.shape)} and {tuple(decoded.shape)}."
        )
    is_precise = logits.shape[1] <= _PRECISE_CLASSES or torch.float64 in (logits.dtype, decoded.dtype)
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    first = torch.float64 if is_precise else torch.float32
    bounds = _bounds(logits.detach(), decoded.detach(), device, first)
    if not is_precise:
        again = (~bounds.isfinite()).any(dim=1).nonzero()[:, 0].to(logits.device)
        if len(again):
            bounds[again.to(device)] = _bounds(logits[again], decoded[again], device, torch.float64)
    return bounds


def _bounds(logits: Tensor, decoded: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    num_rows, num_classes = logits.shape
    columns_at_once = min(num_classes, _TILE_COLUMNS)
    sums = ErrorMoments.empty(num_rows, num_classes, columns_at_once, torch.zeros((), dtype=dtype, device=device))
    if not num_classes:
        return sums.moments.new_zeros(num_rows, len(BOUND_TEMPERATURES))
    elements = _TILE_ELEMENTS if device.type == "cpu" else _TILE_ELEMENTS_ON_DEVICE
    rows_at_once = min(num_rows, max(1, elements // columns_at_once))
    room = torch.empty(8, rows_at_once, columns_at_once, dtype=dtype, device=device)
    for block in row_blocks(num_rows, columns_at_once, max_elements=elements):
        true, coded = logits[block].to(device), decoded[block].to(device)
        top = true.amax(dim=1, keepdim=True).to(dtype)
        centre = sums.centre[block].copy_(coded.amax(dim=1, keepdim=True).to(dtype) - top)
        for start in range(0, num_classes, columns_at_once):
            columns = slice(start, start + columns_at_once)
            tile = _Tile.of(true[:, columns].to(dtype), coded[:, columns].to(dtype), top, centre, room)
            _add(sums, block, tile)
    return sums.scaled_bounds()


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some classes of some rows: d = error - centre and z = logit - largest logit, and the weights exp(z / T).

    The centre, the difference of the two maxima, lies among the errors: it is what the likeliest class is shifted by.

    Attributes
    ----------
    depths, offsets : Tensor [row, class]
        z and d, 0 for a masked class.
    weights, scratch : Tensor [temperature, row, class]
        T = 1, 2, 4; 0 for a masked class.
    highest, lowest : Tensor [row]
        Of d.
    num_counted : Tensor [row] or int
        Classes that are not masked.
    is_unlike : Tensor [row] or None
        Whether classes are masked on one side only.
    """

    depths: Tensor
    offsets: Tensor
    weights: Tensor
    scratch: Tensor
    highest: Tensor
    lowest: Tensor
    num_counted: Tensor | int
    is_unlike: Tensor | None

    @classmethod
    def of(cls, true: Tensor, coded: Tensor, top: Tensor, centre: Tensor, room: Tensor) -> _Tile:
        """Take the classes apart in the room [8, row, class]."""
        room = room[:, : true.shape[0], : true.shape[1]]
        weights, scratch = room[:3], room[3:6]
        offsets = torch.sub(coded, true, out=room[6]).sub_(centre)
        depths = torch.sub(true, top, out=room[7])
        torch.exp(torch.mul(depths, 0.25, out=weights[2]), out=weights[2])
        highest, lowest = offsets.amax(dim=1), offsets.amin(dim=1)
        num_counted: Tensor | int = true.shape[1]
        is_unlike = None
        if not bool((highest - lowest).isfinite().all()):
            masked = true == -torch.inf
            is_unlike = (masked != (coded == -torch.inf)).any(dim=1)
            for values in (offsets, depths, weights[2]):
                values.masked_fill_(masked, 0)
            num_counted = (~masked).sum(dim=1)
            highest, lowest = offsets.amax(dim=1), offsets.amin(dim=1)
        torch.mul(weights[2], weights[2], out=weights[1])
        torch.mul(weights[1], weights[1], out=weights[0])
        return cls(depths, offsets, weights, scratch, highest, lowest, num_counted, is_unlike)


def _add(sums: ErrorMoments, rows: slice, tile: _Tile) -> None:
    """Add some classes of some rows."""
    # sums of products, not matrix products: those may be rounded to ten bits where a program asks for speed
    weight, depth, offset, square = sums.moments[:, rows]
    weights, scratch = tile.weights, tile.scratch
    weight[:, :3] += weights.sum(dim=2).T
    depth[:, :3] += torch.mul(weights, tile.depths, out=scratch).sum(dim=2).T
    offset[:, :3] += torch.mul(weights, tile.offsets, out=scratch).sum(dim=2).T
    square[:, :3] += scratch.mul_(tile.offsets).sum(dim=2).T
    weight[:, 3] += tile.num_counted
    depth[:, 3] += tile.depths.sum(dim=1)
    offset[:, 3] += tile.offsets.sum(dim=1)
    square[:, 3] += torch.mul(tile.offsets, tile.offsets, out=scratch[0]).sum(dim=1)
    sums.highest[rows] = torch.maximum(sums.highest[rows], tile.highest.double())
    sums.lowest[rows] = torch.minimum(sums.lowest[rows], tile.lowest.double())
    if tile.is_unlike is not None:
        sums.is_unlike[rows] |= tile.is_unlike
