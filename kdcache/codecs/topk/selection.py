"""Gaps to a row's maximum, and the classes with the smallest of them."""

from __future__ import annotations

__all__ = ["gaps_to_maximum", "largest", "last_finite", "refuse_other_masks"]

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from kdcache.errors import CodecError, NonFiniteLogitsError


def gaps_to_maximum(
    logits: Float[Tensor, "row class"], *, reach: float, first_row: int = 0
) -> Float32[Tensor, "row class"]:
    """Give each logit's gap to its row's maximum, infinite for masked classes.

    Parameters
    ----------
    logits : Tensor [row, class]
        Of any floating-point type; float64 is subtracted in float64.
    reach : float
        Gap beyond which a class counts as masked.
    first_row : int, default 0
        Number of the first row, for messages.

    Raises
    ------
    NonFiniteLogitsError
        A row holds NaN or +inf, or nothing but -inf.
    """
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    highest = wide.amax(dim=1, keepdim=True)
    if not bool(highest.isfinite().all()):
        row = first_row + int(highest.isfinite().logical_not().nonzero()[0, 0])
        raise NonFiniteLogitsError(
            f"Row {row} of the logits holds NaN or +inf, or nothing but -inf; a cache keeps finite logits, and "
            "-inf for masked classes beside at least one finite logit."
        )
    gaps = (highest - wide).to(torch.float32)
    return gaps.masked_fill_(gaps > reach, torch.inf) if bool(gaps.amax() > reach) else gaps


def refuse_other_masks(
    gaps: Float32[Tensor, "row class"], masked: Bool[Tensor, " class"], *, first_row: int = 0
) -> None:
    """Refuse rows that mask other classes than the pilot did.

    Parameters
    ----------
    gaps : Tensor [row, class]
        Infinite for masked classes.
    masked : Tensor [class]
        Whether every row of the pilot masks the class.
    first_row : int, default 0
        Number of the first row, for messages.

    Raises
    ------
    CodecError
        A row masks other classes.
    """
    if bool((gaps.amax() < torch.inf) & ~masked.any()):
        return
    differ = (gaps == torch.inf) != masked
    if bool(differ.any()):
        row, index = differ.nonzero()[0].tolist()
        now, before = ("not ", "every") if bool(masked[index]) else ("", "not every")
        raise CodecError(
            f"Row {first_row + row}: class {index} is {now}masked, and is masked in {before} row of the pilot. Class "
            'means hold masks that are the same in every row. Use TopK(tail="samples") or Lossless(), which keep masks '
            "that change from row to row. None of these rows was encoded."
        )


def largest(
    gaps: Float32[Tensor, "row class"], count: int, *, num_gaps: int = 0
) -> tuple[Int64[Tensor, "row place"], Float32[Tensor, "row place"]]:
    """Find the classes with the smallest gaps, the lowest classes first among equal gaps.

    Parameters
    ----------
    gaps : Tensor [row, class]
        Infinite for masked classes, which are never found.
    count : int
        Classes wanted, at most all.
    num_gaps : int, default 0
        Gaps wanted, where there are that many classes; at least `count` are given.

    Returns
    -------
    tuple of Tensor
        Classes [row, place], int64, rising; places of rows with fewer than `count` hold the number of classes. And the
        smallest gaps, rising.
    """
    num_classes = gaps.shape[1]
    closest, classes = gaps.topk(min(max(count + 1, num_gaps), num_classes), dim=1, largest=False)
    classes = classes[:, :count].sort(dim=1).values
    weakest = closest[:, count - 1]
    tied = weakest == torch.inf
    if count < num_classes:
        tied |= closest[:, count] == weakest
    rows = tied.nonzero()[:, 0]
    if len(rows):
        classes[rows] = _first_of_equals(gaps[rows], closest[rows, :count])
    return classes, closest


def last_finite(rising: Float32[Tensor, "row place"]) -> Float32[Tensor, " row"]:
    """Give the largest finite number of each row."""
    return torch.where(rising == torch.inf, -torch.inf, rising).amax(dim=1)


def _first_of_equals(gaps: Tensor, closest: Tensor) -> Tensor:
    """Find the classes of the smallest finite gaps, the lowest first among equals; [row, place], rising."""
    num_rows, num_kept = closest.shape
    weakest = last_finite(closest)
    rows, classes = (gaps <= weakest[:, None]).nonzero().unbind(dim=1)
    equal = gaps[rows, classes] == weakest[rows]
    num_equal = _counts(rows[equal], num_rows)
    order = equal.cumsum(0) - (num_equal.cumsum(0) - num_equal)[rows]  # 1 for the row's first equal class, 2, ...
    room = num_kept - _counts(rows[~equal], num_rows)
    chosen = ~equal | (order <= room[rows])
    rows, classes = rows[chosen], classes[chosen]
    counts = _counts(rows, num_rows)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    listed = torch.full((num_rows, num_kept), gaps.shape[1], device=rows.device)
    listed[rows, places] = classes
    return listed


def _counts(rows: Tensor, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.int64, device=rows.device).index_add_(0, rows, torch.ones_like(rows))
