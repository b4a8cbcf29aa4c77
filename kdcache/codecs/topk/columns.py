"""Named fields of whole numbers as the uint16 columns of a row of codes."""

from __future__ import annotations

__all__ = ["LARGEST_CODE", "Columns"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

LARGEST_CODE = 65534
"""Largest number that a column holds: 65,535 is the fill code."""

_BASE = LARGEST_CODE + 1


@dataclass(frozen=True)
class Columns:
    """A layout: fields one after the other, then the high parts of the fields whose numbers may pass 65,534.

    A number n of such a field stands as n % 65,535 in the field's own place and as n // 65,535 in its high part. High
    parts are nearly always 0, and stand together where they compress away.

    Parameters
    ----------
    widths : Mapping[str, int]
        Columns of every field, in order.
    high : tuple of str
        Fields that have a high part.
    """

    widths: Mapping[str, int]
    high: tuple[str, ...] = ()

    @property
    def num_columns(self) -> int:
        """Columns of a row."""
        return sum(self.widths.values()) + sum(self.widths[name] for name in self.high)

    def pack(self, fields: Mapping[str, Shaped[Tensor, "row place"]]) -> Shaped[Tensor, "row column"]:
        """Give fields of int64 numbers, [row, place] each, as uint16 codes."""
        low = [fields[name] % _BASE if name in self.high else fields[name] for name in self.widths]
        high = [fields[name] // _BASE for name in self.high]
        return torch.cat([*low, *high], dim=1).to(torch.int32).to(torch.uint16)

    def unpack(self, codes: Shaped[Tensor, "row column"]) -> dict[str, Shaped[Tensor, "row place"]]:
        """Give uint16 codes as fields of int64 numbers."""
        sizes = [*self.widths.values(), *(self.widths[name] for name in self.high)]
        parts = codes.to(torch.int64).split(sizes, dim=1)
        fields = dict(zip(self.widths, parts, strict=False))
        for name, part in zip(self.high, parts[len(self.widths) :], strict=True):
            fields[name] = fields[name] + part * _BASE
        return fields
