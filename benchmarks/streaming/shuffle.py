"""Part D: how good a windowed shuffle is, beside a true permutation, and what it costs a small student."""

from __future__ import annotations

__all__ = ["measures_of", "run"]

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.streaming.shuffle_students import accuracies
from kdcache.stream.order import Order, ShuffledOrder, WindowedOrder

WINDOWS: Final = (1, 2, 4, 8, 16, 32, 64)
BATCH_SIZE: Final = 256
_BLOCK_ROWS: Final = 256
_NUM_BLOCKS: Final = 512
_NUM_CLASSES: Final = 100
_SEEDS: Final = (0, 1, 2)
_QUANTILES: Final = (0.1, 0.5, 0.9)


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure orders of 512 blocks of 256 rows that are stored by label, and train students."""
    num_blocks = _NUM_BLOCKS // 2 if quick else _NUM_BLOCKS
    num_rows = num_blocks * _BLOCK_ROWS
    first_examples = np.arange(num_blocks + 1) * _BLOCK_ROWS
    orders: dict[str, list[npt.NDArray[np.int64]]] = {
        str(window): [_whole(WindowedOrder(first_examples, window, seed, 0)) for seed in _SEEDS] for window in WINDOWS
    }
    orders["whole"] = [_whole(ShuffledOrder(num_rows, seed, 0)) for seed in _SEEDS]
    orders["true permutation"] = [np.random.default_rng(seed).permutation(num_rows) for seed in _SEEDS]
    lines = [{"window": name, **_mean([measures_of(one) for one in some])} for name, some in orders.items()]
    return {
        "orders": lines, "num_blocks": num_blocks, "block_rows": _BLOCK_ROWS, "num_classes": _NUM_CLASSES,
        "batch_size": BATCH_SIZE, "students": accuracies(quick=quick),
    }  # fmt: skip


def measures_of(
    order: npt.NDArray[np.int64], *, batch_size: int = BATCH_SIZE, num_classes: int = _NUM_CLASSES
) -> dict[str, float]:
    """Measure an order of rows that are stored by label, all classes alike in size.

    Parameters
    ----------
    order : ndarray [position] of int64
        Which row stands at which position.
    batch_size : int
    num_classes : int

    Returns
    -------
    dict
        ``neighbours``: pairs of rows next to each other in storage that fall into one batch, over what a permutation
        gives. ``class_variance``: variance of a batch's counts of classes over that of a random draw without
        replacement. ``classes_in_batch``: different classes of a batch, the mean. ``displacement_P``: quantiles of the
        distance between a row's place in storage and in the epoch, as a share of all rows.
    """
    num_rows = len(order)
    place = np.empty(num_rows, np.int64)
    place[order] = np.arange(num_rows)
    batch_of = place // batch_size
    together = float((batch_of[1:] == batch_of[:-1]).mean())
    num_batches = num_rows // batch_size
    labels = order[: num_batches * batch_size] * num_classes // num_rows
    counts = np.zeros((num_batches, num_classes), np.int64)
    np.add.at(counts, (np.arange(len(labels)) // batch_size, labels), 1)
    expected = batch_size / num_classes * (1 - 1 / num_classes) * (num_rows - batch_size) / (num_rows - 1)
    displacement = np.abs(place - np.arange(num_rows)) / num_rows
    quantiles = np.quantile(displacement, _QUANTILES).tolist()
    return {
        "neighbours": together / ((batch_size - 1) / (num_rows - 1)),
        "class_variance": float(((counts - batch_size / num_classes) ** 2).mean() / expected),
        "classes_in_batch": float((counts > 0).sum(1).mean()),
        **{f"displacement_{round(100 * q)}": value for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }


def _whole(order: Order) -> npt.NDArray[np.int64]:
    return order.at(np.arange(order.num_examples))


def _mean(some: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in some])) for name in some[0]}
