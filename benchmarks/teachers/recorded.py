"""What a teacher said, kept: the rows of one recording, their logits, and a split that shares no example."""

from __future__ import annotations

__all__ = ["Head", "Recorded", "split_by_example"]

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["main", "other"]


class Head(NamedTuple):
    """The last linear layer of a network: logits = hidden @ weight.T + bias.

    Attributes
    ----------
    weight
        float32 [class, component].
    bias
        float32 [class], or None.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """A teacher's answers over a set of inputs.

    Parameters
    ----------
    name, kind
        The teacher, and which inputs: "main", or "other" ones of another kind.
    num_classes
        Classes of the teacher.
    example_index
        int64 [row]: the window, picture or line that each row belongs to.
    hidden
        float32 [row, component], the input of the last linear layer; None when it was not recorded.
    head
        The last linear layer; None when it was not recorded.
    stored_logits
        float32 [row, class] as the teacher gave them, mapped from a file; None: logits are computed from `hidden` and
        `head`, in float32.
    token_ids
        int64 [row], the last token a language model had read at each row; None for other teachers.

    Raises
    ------
    ValueError
        There is nothing to take logits from, or the fields disagree about rows or classes.
    """

    name: str
    kind: Kind
    num_classes: int
    example_index: Int[Tensor, " row"]
    hidden: Float[Tensor, "row component"] | None = None
    head: Head | None = None
    stored_logits: Float[Tensor, "row class"] | None = None
    token_ids: Int[Tensor, " row"] | None = None

    def __post_init__(self) -> None:
        if self.stored_logits is None and (self.hidden is None or self.head is None):
            raise ValueError(f"{self.name}: a recording needs logits, or hidden states with a head")
        for field in ("hidden", "stored_logits", "token_ids"):
            rows = getattr(self, field)
            if rows is not None and len(rows) != self.num_rows:
                raise ValueError(f"{self.name}: {field} has {len(rows)} rows, example_index {self.num_rows}")
        widths = [len(self.head.weight)] if self.head is not None else []
        widths += [self.stored_logits.shape[1]] if self.stored_logits is not None else []
        if any(width != self.num_classes for width in widths):
            raise ValueError(f"{self.name}: expected {self.num_classes} classes, got {widths}")

    @property
    def num_rows(self) -> int:
        """Rows recorded."""
        return len(self.example_index)

    def logits(self, rows: slice | Int[Tensor, " row"]) -> Float[Tensor, "row class"]:
        """Give the logits of some rows: float32 [row, class].

        Parameters
        ----------
        rows
            A slice, or int64 row numbers in any order.
        """
        if self.stored_logits is not None:
            return self.stored_logits[rows].clone()
        if self.hidden is None or self.head is None:
            raise ValueError(f"{self.name}: nothing to take logits from")
        return torch.nn.functional.linear(self.hidden[rows], self.head.weight, self.head.bias)

    def split(self, num_held_out: int, seed: int = 0) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Split the rows into pilot and held-out ones with no example on both sides; see `split_by_example`."""
        return split_by_example(self.example_index, num_held_out, seed=seed)


def split_by_example(
    example_index: Int[Tensor, " row"], num_held_out: int, *, seed: int = 0
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Hold out rows of randomly drawn examples; no example gives rows to both sides.

    Examples are drawn in a seeded random order until they have at least `num_held_out` rows. Rows of the last one drawn
    that are not needed belong to neither side.

    Parameters
    ----------
    example_index
        int64 [row], the example of each row, in any order.
    num_held_out
        Rows to hold out.
    seed
        Seed of the draw.

    Returns
    -------
    tuple[Tensor, Tensor]
        Row numbers, int64 and ascending: of the pilot, and of exactly `num_held_out` rows held out.

    Raises
    ------
    ValueError
        `num_held_out` is negative, or leaves no example to the pilot.

    Examples
    --------
    >>> pilot, held_out = split_by_example(torch.tensor([7, 7, 8, 8, 9, 9]), 3)
    >>> len(pilot), len(held_out)
    (2, 3)
    """
    examples, example_of_row = torch.unique(example_index, return_inverse=True)
    num_rows = torch.bincount(example_of_row, minlength=len(examples))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    reached = num_rows[order].cumsum(0)
    num_drawn = int(torch.searchsorted(reached, num_held_out)) + 1 if num_held_out > 0 else 0
    if num_held_out < 0 or num_drawn >= len(examples):
        raise ValueError(
            f"expected num_held_out from 0 to {int(reached[-2]) if len(examples) > 1 else 0}, since whole examples are "
            f"held out and one must stay; got {num_held_out}"
        )
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    rows_by_place = torch.argsort(place[example_of_row], stable=True)
    held_out = rows_by_place[:num_held_out].sort().values
    first_pilot = int(reached[num_drawn - 1]) if num_drawn else 0
    return rows_by_place[first_pilot:].sort().values, held_out
