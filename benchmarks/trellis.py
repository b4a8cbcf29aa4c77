"""Dependent quantisation as in VVC: two interleaved quantisers, chosen by the parities of a row's earlier numbers.

In half steps, the first has the even multiples of a step and the second 0 and the odd ones. Which one a component
has follows from two bits (a, b), at first 0: after each number, of parity p, they become (p XOR b, a). So a decoder
needs exclusive ors along every second component, and value = 2 number - sign(number) a, in half steps.
"""

from __future__ import annotations

__all__ = ["decoded", "rounded"]

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_NEXT: Final = np.array([[0, 2], [2, 0], [1, 3], [3, 1]])  # [state, parity]; the upper bit of a state is a
_FROM: Final = [
    [(state, parity) for state in range(4) for parity in (0, 1) if _NEXT[state, parity] == to] for to in range(4)
]
_SPACING: Final = 1.2  # of numbers, in plain steps of the same error: measured on Gaussians from 1 to 4 steps wide


def rounded(values: Array, *, least: float) -> tuple[Array, Array]:
    """Quantise values [row, component], in steps: those of components at least so wide along the trellis.

    Returns
    -------
    numbers : ndarray [row, component]
        int64.
    meant : ndarray [row, component]
        The values that the numbers mean.
    """
    numbers = np.rint(values).astype(np.int64)
    meant = numbers.astype(np.float64)
    wide = int((values.std(axis=0) > least).sum())  # components are in order of their spread
    if wide:
        numbers[:, :wide] = _best_path(values[:, :wide] * (2 / _SPACING))
        meant[:, :wide] = decoded(numbers[:, :wide]) * (_SPACING / 2)
    return numbers, meant


def decoded(numbers: Array) -> Array:
    """Give the values [row, component] in half steps."""
    parity = (numbers & 1).astype(np.int8)
    state = np.zeros_like(parity)
    state[:, 1::2] = np.bitwise_xor.accumulate(parity[:, 0::2], axis=1)[:, : state[:, 1::2].shape[1]]
    state[:, 2::2] = np.bitwise_xor.accumulate(parity[:, 1::2], axis=1)[:, : state[:, 2::2].shape[1]]
    values: Array = 2 * numbers - np.sign(numbers) * state
    return values


def _best_path(values: Array) -> Array:
    """Search the numbers of least squared error (Viterbi), all rows at once."""
    num_rows, num_components = values.shape
    cost = np.full((4, num_rows), np.inf)
    cost[0] = 0
    taken = np.empty((num_components, 4, num_rows), np.int8)
    for component in range(num_components):
        errors = [(values[:, component] - near) ** 2 for near in _candidates(values[:, component])]
        ways = np.array([[cost[state] + errors[_subset(state, parity)] for state, parity in way] for way in _FROM])
        taken[component] = ways.argmin(axis=1)
        cost = ways.min(axis=1)
    return _traced(values, taken, cost.argmin(axis=0))


def _traced(values: Array, taken: Array, state: Array) -> Array:
    numbers = np.empty(values.shape, np.int64)
    rows = np.arange(len(values))
    origin = np.array(_FROM)
    for component in range(values.shape[1] - 1, -1, -1):
        before, parity = origin[state, taken[component, state, rows]].T
        value = np.stack(_candidates(values[:, component]))[_subset(before, parity), rows]
        numbers[:, component] = np.rint((value + np.sign(value) * (before >> 1)) / 2)
        state = before
    return numbers


def _subset(state: Any, parity: Any) -> Any:
    return 2 * (state >> 1) + parity


def _candidates(values: Array) -> tuple[Array, Array, Array, Array]:
    """Give the nearest value of either quantiser, with even and with odd number."""
    sign = np.where(values < 0, -1.0, 1.0)
    size = np.abs(values)
    return (
        4 * np.rint(values / 4),
        4 * np.rint((values - 2) / 4) + 2,
        np.where(size < 1.5, 0, np.maximum(4 * np.rint((size - 3) / 4) + 3, 3)) * sign,
        np.maximum(4 * np.rint((size - 1) / 4) + 1, 1) * sign,
    )
