"""Means in place of one mean, and the entropy that is left beside them."""

from __future__ import annotations

__all__ = ["entropy_of", "fitted_means", "nearest"]

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ROUNDS: Final = 15
_DOUBT_ROWS: Final = 2  # at the mean of all rows, which is 0: a mean of few rows is drawn there


def fitted_means(rows: Array, count: int) -> Array:
    """Fit means [mean, component] to rows [row, component] by Lloyd's rounds."""
    means: Array = rows[np.random.default_rng(0).choice(len(rows), count, replace=False)]
    for _ in range(_ROUNDS):
        labels = nearest(rows, means)
        for label in np.unique(labels):
            members = rows[labels == label]
            means[label] = members.sum(axis=0) / (len(members) + _DOUBT_ROWS)
    return means


def nearest(rows: Array, means: Array) -> Array:
    """Give the number of the nearest mean, int64 [row]."""
    labels: Array = ((means**2).sum(axis=1) - 2 * rows @ means.T).argmin(axis=1)
    return labels


def entropy_of(numbers: Array) -> float:
    """Give the sum of the columns' entropies, corrected for few rows (Miller and Madow), in bytes a row."""
    bits = 0.0
    for column in numbers.T:
        counts = np.unique(column, return_counts=True)[1]
        share = counts / counts.sum()
        bits += float(-(share * np.log2(share)).sum()) + (len(counts) - 1) / (2 * len(column) * np.log(2))
    return bits / 8
