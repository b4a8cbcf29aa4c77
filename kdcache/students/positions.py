"""Positions: which of a padded batch's positions meet which cached rows, with padding at either side."""

from __future__ import annotations

__all__ = ["CachedRows", "cached_rows"]

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kdcache.errors import ShapeError
from kdcache.losses import DistillationLoss
from kdcache.soft_targets import SoftTargets


@dataclass(frozen=True, eq=False)
class CachedRows:
    """A batch's soft targets, and where in the student's logits their rows stand.

    Parameters
    ----------
    soft_targets : SoftTargets
    first_position : Tensor [example] of int64, optional
        Where each example begins; None where all begin at position 0, or have one row.
    counted : Tensor [row] of bool, optional
        The cached rows that count; all where absent.
    where : str
        The batch, for messages.
    """

    soft_targets: SoftTargets
    first_position: Int64[Tensor, " example"] | None
    counted: Bool[Tensor, " row"] | None
    where: str

    @property
    def num_counted(self) -> int:
        """How many rows count."""
        return len(self.soft_targets) if self.counted is None else int(self.counted.sum())

    def total(self, logits: Float[Tensor, "*batch class"], term: DistillationLoss) -> Float[Tensor, ""]:
        """Sum a loss over the rows that count.

        Parameters
        ----------
        logits : Tensor [example, class] or [example, position, class]
        term : DistillationLoss
            With the reduction "sum".

        Raises
        ------
        ShapeError
            The logits do not fit the rows.
        """
        if self.first_position is None and self.counted is None:
            loss: Tensor = term(logits, self.soft_targets)
            return loss
        if self.soft_targets.num_rows is None:
            kept = None if self.counted is None else self.counted.to(logits.device)
            masked: Tensor = term(logits, self.soft_targets, mask=kept)
            return masked
        chosen = self._chosen_positions(logits)
        kept_rows = self.soft_targets if self.counted is None else self.soft_targets.rows(self.counted)
        found: Tensor = term(logits.flatten(0, 1).index_select(0, chosen.to(logits.device)), kept_rows)
        return found

    def _chosen_positions(self, logits: Tensor) -> Int64[Tensor, " kept"]:
        """Give the place of each counted row among the student's positions, all examples' one after the other."""
        num_rows = _row_counts(self.soft_targets)
        if logits.ndim != 3 or len(logits) != len(num_rows):
            raise ShapeError(
                f"{self.where}: the student's logits have the shape {tuple(logits.shape)} for {len(num_rows)} examples "
                "of sequences; they must be [example, position, class]"
            )
        example, position = _examples_and_positions(num_rows, self.first_position)
        num_positions = logits.shape[1]
        if position.numel() and int(position.max()) >= num_positions:
            raise ShapeError(
                f"{self.where}: an example has a cached row at position {int(position.max())}, and the student gives "
                f"{num_positions} positions. Cut no example shorter than it was cached"
            )
        places = example * num_positions + position
        return places if self.counted is None else places[self.counted]


def cached_rows(
    soft_targets: SoftTargets,
    *,
    attention_mask: Tensor | None,
    labelled: Tensor | None,
    labels_are_ahead: bool,
    ids: list[Any],
    where: str,
) -> CachedRows:
    """Find where the cached rows of a batch stand, and which of them count.

    Parameters
    ----------
    soft_targets : SoftTargets
        Of sequences, with `num_rows`.
    attention_mask : Tensor [example, position], optional
        0 in padding. Masks of other shapes say nothing of padding and are left alone.
    labelled : Tensor [example] or [example, position] of bool, optional
        Where rows without a label do not count: False in these.
    labels_are_ahead : bool
        Whether the label of position i stands at i + 1, as a causal model's does.
    ids : list of int or str [example]
    where : str
        The batch, for messages.

    Raises
    ------
    ShapeError
        An example has fewer tokens than cached rows, or there are not as many labels as examples.
    """
    if soft_targets.num_rows is None:
        return CachedRows(soft_targets, None, None if labelled is None else labelled.cpu(), where)
    first = None
    if attention_mask is not None and attention_mask.ndim == 2:
        first = _first_positions(attention_mask.cpu() != 0, _row_counts(soft_targets), ids, where)
    counted = None
    if labelled is not None:
        example, position = _examples_and_positions(_row_counts(soft_targets), first)
        counted = _at(labelled.cpu(), example, position + labels_are_ahead, where)
    return CachedRows(soft_targets, first, counted, where)


def _first_positions(
    mask: Bool[Tensor, "example position"], num_rows: Int64[Tensor, " example"], ids: list[Any], where: str
) -> Int64[Tensor, " example"] | None:
    num_tokens = mask.sum(dim=1)
    if len(num_tokens) != len(num_rows):
        raise ShapeError(f"{where}: its attention_mask is of {len(mask)} examples, the ids are {len(num_rows)}")
    short = (num_tokens < num_rows).nonzero()[:, 0]
    if len(short):
        index = int(short[0])
        raise ShapeError(
            f"{where}: example {ids[index]!r} has {int(num_tokens[index])} tokens, and {int(num_rows[index])} rows in "
            "the cache, so that rows would meet padding. Give the tokens that the teachers saw, cut no shorter"
        )
    first: Tensor = mask.int().argmax(dim=1)
    return first if bool(first.any()) else None


def _examples_and_positions(
    num_rows: Int64[Tensor, " example"], first: Int64[Tensor, " example"] | None
) -> tuple[Int64[Tensor, " row"], Int64[Tensor, " row"]]:
    example = torch.arange(len(num_rows)).repeat_interleave(num_rows)
    begins = num_rows.cumsum(0) - num_rows
    position = torch.arange(len(example)) - begins[example]
    return example, position if first is None else position + first[example]


def _at(labelled: Tensor, example: Tensor, position: Tensor, where: str) -> Bool[Tensor, " row"]:
    """Tell which rows have a label; a row beyond the labels has none."""
    if labelled.ndim != 2:
        raise ShapeError(
            f"{where}: its labels have {labelled.ndim} axes, and its examples several rows each; unlabelled_rows="
            "'ignore' needs labels [example, position]"
        )
    within = position < labelled.shape[1]
    return labelled[example, position.clamp(max=labelled.shape[1] - 1)] & within


def _row_counts(soft_targets: SoftTargets) -> Int64[Tensor, " example"]:
    counts = soft_targets.num_rows
    return torch.zeros(0, dtype=torch.int64) if counts is None else counts.cpu().to(torch.int64)
