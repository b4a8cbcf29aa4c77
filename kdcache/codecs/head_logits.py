"""Logits that are not made yet: a teacher's last hidden states and its head.

The logits of a row are weight @ hidden + bias. A few hundred numbers a row stand for tens of thousands; logits are made
for some rows or some classes at a time, by whoever needs them.
"""

from __future__ import annotations

__all__ = ["Head", "HeadLogits", "Logits", "concatenated", "on_device", "rows_of"]

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from kdcache.codecs.precision import keeps_float32
from kdcache.errors import NonFiniteLogitsError, ShapeError


@dataclass(frozen=True, eq=False)
class Head:
    """A teacher's last linear layer.

    Parameters
    ----------
    weight : Tensor [class, component]
        Of any floating-point type; float16 and bfloat16 heads are multiplied in their type where speed counts.
    bias : Tensor [class], optional
        -inf masks a class.

    Raises
    ------
    ShapeError
        The weight has other axes, or the bias another number of classes.
    """

    weight: Float[Tensor, "class component"]
    bias: Float[Tensor, " class"] | None = None
    prepared: dict[object, object] = field(default_factory=dict, init=False, repr=False)
    """What codecs derived from this head, by their own keys, so that it is derived once."""

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise ShapeError(
                "A head's weight must have the axes [class, component] and a floating-point type, got shape "
                f"{tuple(self.weight.shape)} and {self.weight.dtype}."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ShapeError(f"The head has {len(self.weight)} classes and a bias of shape {tuple(self.bias.shape)}.")

    @functools.cached_property
    def means(self) -> tuple[Float64[Tensor, " component"], Float64[Tensor, ""]]:
        """Give the means over classes of weight and bias."""
        weight = self.weight.mean(dim=0, dtype=torch.float64)
        return weight, weight.new_zeros(()) if self.bias is None else self.bias.mean(dtype=torch.float64)

    def check_values(self) -> None:
        """Refuse a head that gives no number, once.

        Raises
        ------
        NonFiniteLogitsError
            A weight is NaN or infinite, or the bias NaN or +inf.
        """
        if "finite" in self.prepared:
            return
        bias = None if self.bias is None else self.bias.isnan() | self.bias.isposinf()
        wrong = self.weight.isfinite().all(dim=1).logical_not()
        wrong = wrong if bias is None else wrong | bias
        if bool(wrong.any()):
            raise NonFiniteLogitsError(
                f"The head's class {int(wrong.nonzero()[0])} has a weight or bias that is NaN or infinite: no row has "
                "soft targets. Only the bias may be -inf, which masks a class. None of these rows was encoded."
            )
        self.prepared["finite"] = True

    def classes(self, index: slice | Tensor) -> Head:
        """Give the head of some classes: a slice, their numbers, or a mask."""
        return Head(self.weight[index], None if self.bias is None else self.bias[index])

    def to(self, device: torch.device | str) -> Head:
        """Give the head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return self if self.weight.device == torch.device(device) else Head(self.weight.to(device), bias)

    def logits(
        self, hidden: Float[Tensor, "row component"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "row class"]:
        """Multiply, in `dtype`; for float32 in float64, where torch may round its factors."""
        factors = dtype if dtype != torch.float32 or keeps_float32(hidden.device) else torch.float64
        with torch.autocast(hidden.device.type, enabled=False):
            product = (hidden.to(factors) @ self.weight.to(factors).T).to(dtype)
            return product if self.bias is None else product + self.bias.to(dtype)


@dataclass(frozen=True, eq=False)
class HeadLogits:
    """Rows of logits as hidden states and their head; indexing makes the logits asked for, float32.

    Parameters
    ----------
    hidden : Tensor [row, component]
        Of any floating-point type.
    head : Head
        On the same device.

    Raises
    ------
    ShapeError
        The hidden states have other axes, or another number of components than the head.
    """

    hidden: Float[Tensor, "row component"]
    head: Head

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or self.hidden.shape[1] != self.head.weight.shape[1]:
            raise ShapeError(
                f"Hidden states must have the axes [row, component] with {self.head.weight.shape[1]} components as the "
                f"head has, got shape {tuple(self.hidden.shape)}."
            )

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(
        self, index: slice | Tensor | tuple[slice | Tensor, slice | Tensor]
    ) -> Float32[Tensor, "row class"]:
        """Make the logits of some rows, or of some rows and classes."""
        if isinstance(index, tuple):
            rows, classes = index
            return self.head.classes(classes).logits(self.hidden[rows])
        return self.head.logits(self.hidden[index])

    @property
    def shape(self) -> torch.Size:
        """Rows and classes."""
        return torch.Size((len(self.hidden), len(self.head.weight)))

    @property
    def ndim(self) -> int:
        """Two axes: row and class."""
        return 2

    @property
    def device(self) -> torch.device:
        """Where the hidden states lie."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the logits that are made: float32."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return self.hidden.nbytes

    def rows(self, index: slice | Tensor) -> HeadLogits:
        """Give some rows, their logits still not made."""
        return HeadLogits(self.hidden[index], self.head)

    def of_head(self, head: Head) -> HeadLogits:
        """Give the rows over another head's classes."""
        return HeadLogits(self.hidden, head)

    def of_classes(self, index: Bool[Tensor, " class"]) -> HeadLogits:
        """Give the rows over some of their classes."""
        last = self.head.prepared.get("classes")
        if not (isinstance(last, tuple) and torch.equal(last[0], index)):
            last = self.head.prepared["classes"] = (index, self.head.classes(index))
        return HeadLogits(self.hidden, last[1])

    def is_floating_point(self) -> bool:
        """Say that logits are floating-point numbers, as a tensor says it."""
        return True


Logits = Tensor | HeadLogits
"""Rows of logits, made or not: [row, class]."""


def concatenated(parts: Sequence[Logits]) -> Logits:
    """Join rows one after the other; all parts are made, or all are of one head."""
    first = parts[0]
    if isinstance(first, HeadLogits):
        return HeadLogits(torch.cat([part.hidden for part in parts if isinstance(part, HeadLogits)]), first.head)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def rows_of(logits: Logits, index: slice | Tensor) -> Logits:
    """Give some rows, made or not as they were."""
    return logits.rows(index) if isinstance(logits, HeadLogits) else logits[index]


def on_device(logits: Logits, device: torch.device | str) -> Logits:
    """Move rows, made or not as they were; a head moves with them."""
    if isinstance(logits, Tensor):
        return logits.to(device)
    if logits.device == torch.device(device):
        return logits
    return HeadLogits(logits.hidden.to(device), logits.head.to(device))
