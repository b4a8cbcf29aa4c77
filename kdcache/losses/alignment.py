"""Which rows of a student's logits count, which cached rows they meet, and how much each of them counts.

Rows are those of the student's logits, [row] or [example, position] without their last axis. Left out are rows that a
mask leaves out, those of weight 0, and positions beyond the rows that an example has in the cache.
"""

from __future__ import annotations

__all__ = [
    "NO_LABEL",
    "Alignment",
    "Scales",
    "aligned",
    "counted_rows",
    "labels_beside",
    "scales_beside",
    "soft_targets_beside",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from kdcache.errors import OptionError, ShapeError
from kdcache.losses.by_formula import Labels
from kdcache.losses.divergences import Reduction
from kdcache.soft_targets import SoftTargets

NO_LABEL = -100
"""What stands for the label of a row that has none."""


@dataclass(frozen=True)
class Alignment:
    """Which rows count. All do where neither `selected` nor `left_out` is there, and both never are.

    Parameters
    ----------
    shape : tuple of int
        Of the student's rows: (row,) or (example, position).
    selected : Tensor [kept] of int64, optional
        The rows that count, and nothing is computed of others.
    left_out : Tensor [row] of bool, optional
        Those that do not. They are computed and thrown away: nobody has to wait for an accelerator to count them.
    cached : Tensor [kept] or [row] of int64, optional
        The cached row of each row that is computed, where that is not its own number.
    """

    shape: tuple[int, ...]
    selected: Int64[Tensor, " kept"] | None = None
    left_out: Bool[Tensor, " row"] | None = None
    cached: Int64[Tensor, " computed"] | None = None

    @property
    def in_words(self) -> str:
        """The student's rows, for a message."""
        return f"{self.shape[0]} rows" if len(self.shape) == 1 else f"{self.shape[0]} examples of {self.shape[1]} rows"

    @property
    def num_computed(self) -> int:
        """How many rows are computed."""
        return math.prod(self.shape) if self.selected is None else len(self.selected)

    def computed(self, values: Tensor) -> Tensor:
        """Give the values, of the student's rows, of those that are computed: [computed]."""
        return values.flatten() if self.selected is None else values.flatten().index_select(0, self.selected)


class Scales(NamedTuple):
    """What the two terms of rows are multiplied by: a number, or one for each row [row, 1]."""

    soft: float | Float[Tensor, "row 1"]
    hard: float | Float[Tensor, "row 1"]


def counted_rows(
    shape: tuple[int, ...],
    mask: Bool[Tensor, "*batch"] | None,
    row_weights: Float[Tensor, "*batch"] | None,
) -> list[Bool[Tensor, "*batch"]]:
    """Give what leaves rows out, after checking it: the mask, and which weights are above 0.

    Raises
    ------
    OptionError
        A weight is negative or not finite; looked for on the processor only.
    ShapeError
        Mask or weights have another shape or type than there are rows.
    """
    counted = []
    if mask is not None:
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"`mask` must be of bool with the shape {shape} of the student's rows, True where a row counts, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}."
            )
        counted.append(mask)
    if row_weights is not None:
        if row_weights.shape != shape or row_weights.is_complex() or row_weights.dtype == torch.bool:
            raise ShapeError(
                f"`row_weights` must be numbers with the shape {shape} of the student's rows, got {row_weights.dtype} "
                f"of shape {tuple(row_weights.shape)}. Weights of examples: `weights[:, None].expand{shape}`."
            )
        is_read = row_weights.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_read and not ((row_weights >= 0) & row_weights.isfinite()).all():
            raise OptionError("`row_weights` must be finite and at least 0; to leave a row out, give 0 or a mask.")
        counted.append(row_weights > 0)
    return counted


def aligned(
    student_logits: Float[Tensor, "*batch class"],
    soft_targets: SoftTargets | Tensor,
    counted: Sequence[Bool[Tensor, "*batch"]],
    *,
    can_select: bool,
) -> Alignment:
    """Find the rows that count: those that all of `counted` keep, and that have soft targets.

    Parameters
    ----------
    student_logits : Tensor [row, class] or [example, position, class]
        For their shape and device.
    soft_targets : SoftTargets or Tensor
        Positions beyond the rows of an example have none, where they say how many it has.
    counted : sequence of Tensor [row] or [example, position] of bool
        What `counted_rows` gives.
    can_select : bool
        Whether the number of rows that are computed may depend on what the masks hold.

    Raises
    ------
    ShapeError
        Examples or positions are not those of the soft targets.
    """
    shape = tuple(student_logits.shape[:-1])
    present = None
    if len(shape) == 2 and isinstance(soft_targets, SoftTargets):
        present = _present(soft_targets, *shape)
    given = [*counted, *([] if present is None else [present])]
    if not given:
        return Alignment(shape)
    masks = [mask.to(student_logits.device, non_blocking=True).flatten() for mask in given]
    kept = torch.stack(masks).all(dim=0)
    cached = None if present is None else (masks[-1].cumsum(0) - 1).clamp(min=0)
    if not can_select:
        return Alignment(shape, left_out=kept.logical_not(), cached=cached)
    selected = kept.nonzero()[:, 0]
    return Alignment(shape, selected, cached=None if cached is None else cached.index_select(0, selected))


def soft_targets_beside(
    student_logits: Float[Tensor, "*batch class"], soft_targets: SoftTargets | Tensor, alignment: Alignment
) -> SoftTargets | Float[Tensor, "row teacher class"]:
    """Give soft targets of the rows that are computed, still coded; plain logits of all rows, with an axis of teachers.

    Raises
    ------
    ShapeError
        Rows or classes are not the student's.
    """
    num_classes, shape = student_logits.shape[-1], alignment.shape
    if not isinstance(soft_targets, SoftTargets):
        members = _with_teachers(soft_targets, len(shape))
        found = (*members.shape[: len(shape)], members.shape[-1])
        if found != (*shape, num_classes):
            raise _mismatch(alignment, num_classes, Alignment(found[:-1]).in_words, found[-1])
        return members if len(shape) == 1 else members.reshape(-1, *members.shape[-2:])
    num_found = len(soft_targets)
    if soft_targets.num_classes != num_classes or (len(shape) == 1 and num_found != shape[0]):
        raise _mismatch(alignment, num_classes, f"{num_found} rows", soft_targets.num_classes)
    rows = alignment.selected if alignment.cached is None else alignment.cached
    if rows is None or (alignment.selected is not None and len(rows) == num_found):  # all, and in order
        return soft_targets
    return soft_targets.to(student_logits.device, non_blocking=True).rows(rows)


def labels_beside(
    labels: Int[Tensor, "*batch"] | None,
    student_logits: Float[Tensor, "*batch class"],
    alignment: Alignment,
    *,
    soft_weight: float,
    ignore_index: int,
) -> Labels:
    """Give the labels of the rows that are computed, on the student's device.

    Raises
    ------
    ShapeError
        There are none, or they have another shape or type; or one of a row that counts is no class, which is looked
        for on the processor only.
    """
    if labels is None:
        raise ShapeError(
            f"soft_weight={soft_weight} leaves {1 - soft_weight:.6g} to the labels, and there are none. "
            "Pass `labels`, or soft_weight=1.0 to learn from the soft targets alone."
        )
    if labels.shape != alignment.shape or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(
            f"{alignment.in_words} of student logits need as many integer labels, "
            f"got {labels.dtype} labels of shape {tuple(labels.shape)}."
        )
    device, counted = student_logits.device, alignment.left_out
    is_read = not torch.compiler.is_compiling() and all(
        values.device.type == "cpu" for values in (labels, *([] if counted is None else [counted]))
    )
    classes = alignment.computed(labels.to("cpu" if is_read else device, torch.int64))
    if is_read and counted is None and _all_labelled(classes, student_logits.shape[-1], ignore_index):
        return Labels(classes.to(device), None)
    unlabelled = classes == ignore_index
    if counted is not None:
        unlabelled |= counted
    if is_read:
        _check_classes(classes[~unlabelled] if unlabelled.any() else classes, student_logits.shape[-1])
        if not unlabelled.any():
            return Labels(classes.to(device), None)
    return Labels(classes.masked_fill(unlabelled, NO_LABEL).to(device), unlabelled.to(device))


def scales_beside(
    student_logits: Float[Tensor, "*batch class"],
    alignment: Alignment,
    row_weights: Float[Tensor, "*batch"] | None,
    labels: Labels | None,
    *,
    soft_weight: float,
    reduction: Reduction,
) -> Scales:
    """Give what the terms of the computed rows are multiplied by, so that the reduction is nothing but a sum.

    Of a mean, each term is the weighted mean over the rows that have it: of the hard term, over those with a label.
    """
    weights = _weights(student_logits, alignment, row_weights)
    unlabelled = None if labels is None else labels.unlabelled
    if weights is None and unlabelled is None:
        num_rows = alignment.num_computed
        share = 1 / max(num_rows, 1) if reduction == "mean" else 1.0
        return Scales(soft_weight * share, (1 - soft_weight) * share)
    if weights is None:
        weights = student_logits.new_ones(alignment.num_computed, dtype=_raised_type(student_logits))
    hard = weights if unlabelled is None else weights.masked_fill(unlabelled, 0)
    if reduction == "mean":
        weights, hard = _divided_by_sum(weights), _divided_by_sum(hard)
    return Scales(soft_weight * weights[:, None], (1 - soft_weight) * hard[:, None])


def _weights(student_logits: Tensor, alignment: Alignment, row_weights: Tensor | None) -> Tensor | None:
    """Give weights of the computed rows, 0 in those that are left out; None where all are 1."""
    if row_weights is None and alignment.left_out is None:
        return None
    dtype, device = _raised_type(student_logits), student_logits.device
    weights = None
    if row_weights is not None:
        weights = alignment.computed(row_weights.detach().to(device, dtype, non_blocking=True))
    if alignment.left_out is None:
        return weights
    if weights is None:
        weights = student_logits.new_ones(alignment.num_computed, dtype=dtype)
    return weights.masked_fill(alignment.left_out, 0)


def _raised_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _divided_by_sum(weights: Tensor) -> Tensor:
    total = weights.sum()
    return weights / total.masked_fill(total == 0, 1)


def _present(soft_targets: SoftTargets, num_examples: int, num_positions: int) -> Tensor | None:
    """Tell which positions of which examples have a row: [example, position], or None where all have."""
    num_rows = soft_targets.num_rows
    if num_rows is None:
        if len(soft_targets) == num_examples * num_positions and num_positions == 1:
            return None
        raise ShapeError(
            f"The student gives {num_examples} examples of {num_positions} positions, and these {len(soft_targets)} "
            "rows of soft targets do not say how many each example has. Give them as `read` or the loader does, "
            "with `num_rows`, or give the student's logits of the same rows, with the axes [row, class]."
        )
    if len(num_rows) != num_examples:
        raise ShapeError(
            f"The student gives {num_examples} examples of {num_positions} positions, "
            f"the soft targets are of {len(num_rows)} examples."
        )
    if num_rows.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_num_rows(num_rows, num_positions, len(soft_targets))
    return torch.arange(num_positions, device=num_rows.device) < num_rows[:, None]


def _check_num_rows(num_rows: Tensor, num_positions: int, num_cached: int) -> None:
    if int(num_rows.sum()) != num_cached:
        raise ShapeError(f"`num_rows` counts {int(num_rows.sum())} rows, the soft targets are {num_cached}.")
    if num_rows.numel() and int(num_rows.max()) > num_positions:
        example = int(num_rows.argmax())
        raise ShapeError(
            f"The student gives {num_positions} positions of each example, and example {example} of the batch has "
            f"{int(num_rows[example])} cached rows. A student needs one position a cached row: pad to the longest "
            "example, and cut none shorter than it was cached."
        )


def _with_teachers(logits: Tensor, num_axes: int) -> Tensor:
    """Give plain logits an axis of teachers before that of classes."""
    if logits.ndim == num_axes + 1:
        return logits.unsqueeze(-2)
    if logits.ndim == num_axes + 2:
        return logits
    rows = "row" if num_axes == 1 else "example, position"
    raise ShapeError(
        f"Teacher logits must have the axes [{rows}, class] or [{rows}, teacher, class], got shape "
        f"{tuple(logits.shape)}."
    )


def _mismatch(alignment: Alignment, num_classes: int, found: str, found_classes: int) -> ShapeError:
    return ShapeError(
        f"The student gives {alignment.in_words} of {num_classes} classes, the soft targets are {found} of "
        f"{found_classes} classes. A student needs one row a cached row, and the teachers' classes."
    )


def _all_labelled(classes: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Tell whether the least and the largest label show that all are classes: the usual batch needs no other look."""
    if classes.numel() == 0:
        return False
    lowest, highest = (int(value) for value in classes.aminmax())
    return lowest >= 0 and highest < num_classes and not lowest <= ignore_index <= highest


def _check_classes(classes: Tensor, num_classes: int) -> None:
    if classes.numel() == 0:
        return
    lowest, highest = (int(value) for value in classes.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ShapeError(
            f"Labels range from {lowest} to {highest}, the student's {num_classes} classes from 0 to "
            f"{num_classes - 1}. Rows without a label carry `ignore_index`, or need soft_weight=1.0."
        )
