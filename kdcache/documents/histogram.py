"""Histograms of what is known of rows, in nats: bins of a fixed ratio, so that any two can be added without loss."""

from __future__ import annotations

__all__ = ["SMALLEST", "Histogram"]

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from kdcache.documents.base import Document

SMALLEST = 2.0**-50
"""Values below it, about 1e-15 nats and so below what can be measured, are counted together with zeros."""

_FIRST_BIN = -200
_LAST_BIN = 4 * 1024 - 1
_EDGES = tuple(2.0 ** (quarter / 4 - 1) for quarter in range(1, 4))

Count = Annotated[int, Field(ge=0, le=2**53)]


class Histogram(Document):
    """Rows in each bin; bin k holds values from 2^(k/4) up to, not including, 2^((k + 1)/4)."""

    title: ClassVar[str] = "histogram"

    num_zeros: Count
    """Rows below 2^-50, the first bin's lower edge."""
    first_bin: Annotated[int, Field(ge=_FIRST_BIN, le=_LAST_BIN)] = 0
    """The number k of the first of `counts`; 0 where there are none."""
    counts: tuple[Count, ...] = ()
    """Rows in consecutive bins, the first and the last of them not empty."""

    @model_validator(mode="after")
    def _check(self) -> Histogram:
        if self.counts and not (self.counts[0] and self.counts[-1]):
            raise ValueError("counts start or end with an empty bin")
        if not self.counts and self.first_bin:
            raise ValueError("first_bin is given, and no counts")
        return self

    @property
    def num_rows(self) -> int:
        """Rows of all bins."""
        return self.num_zeros + sum(self.counts)

    @classmethod
    def of(cls, values: Iterable[float]) -> Histogram:
        """Count values that are at least 0 and finite.

        Examples
        --------
        >>> Histogram.of([0.0, 1.0, 1.1, 2.0])
        Histogram(num_zeros=1, first_bin=0, counts=(2, 0, 0, 0, 1))
        """
        bins: dict[int, int] = {}
        num_zeros = 0
        for value in values:
            if value < SMALLEST:
                num_zeros += 1
            else:
                number = _bin(value)
                bins[number] = bins.get(number, 0) + 1
        return cls._of_bins(num_zeros, bins)

    @classmethod
    def merged(cls, histograms: Sequence[Histogram]) -> Histogram:
        """Add histograms: exactly the histogram of all their rows."""
        bins: dict[int, int] = {}
        for histogram in histograms:
            for number, count in enumerate(histogram.counts, start=histogram.first_bin):
                bins[number] = bins.get(number, 0) + count
        return cls._of_bins(sum(histogram.num_zeros for histogram in histograms), bins)

    @classmethod
    def _of_bins(cls, num_zeros: int, bins: dict[int, int]) -> Histogram:
        filled = [number for number, count in bins.items() if count]
        if not filled:
            return cls.make(num_zeros=num_zeros)
        numbers = range(min(filled), max(filled) + 1)
        counts = tuple(bins.get(number, 0) for number in numbers)
        return cls.make(num_zeros=num_zeros, first_bin=numbers[0], counts=counts)

    def quantile(self, share: float, *, largest: float) -> float:
        """Give a number that at least this share of the rows is not above.

        Parameters
        ----------
        share : float
            From 0 to 1, such as 0.99.
        largest : float
            The largest of all rows, which the answer is never above.

        Returns
        -------
        float
            The upper edge of the bin that the quantile lies in: at most 19% above the quantile, or 2^-50.
        """
        needed = math.ceil(share * self.num_rows)
        reached = self.num_zeros
        if reached >= needed:
            return min(SMALLEST, largest)
        number = self.first_bin - 1
        for count in self.counts:
            number += 1
            reached += count
            if reached >= needed:
                break
        return min(2.0 ** ((number + 1) / 4), largest) if number < _LAST_BIN else largest


def _bin(value: float) -> int:
    """Give the number of a value's bin, by comparisons with the edges, which no platform's logarithm can move."""
    fraction, exponent = math.frexp(value)
    return 4 * (exponent - 1) + bisect.bisect_right(_EDGES, fraction)
