"""What the job file names: the transfer set, the test set, and the parts of the transfer set that students train on."""

from __future__ import annotations

__all__ = ["drawn_at_random", "evaluation", "of_classes", "transfer_set", "without_classes"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jobs.mnist.data import DEFAULT_CACHE, read_split
from kdcache import TransferSet
from kdcache.errors import JobError

Ids = npt.NDArray[np.int64]


def transfer_set(*, cache: Path = DEFAULT_CACHE) -> TransferSet:
    """Give the 60,000 training images as they are (no jitter), as float32 [pixel] from 0 to 1, with their labels.

    Parameters
    ----------
    cache : Path
        Folder that `jobs.mnist.data.fetch` filled.

    Raises
    ------
    MnistUnavailableError
        The data has not been fetched.
    """
    split = read_split("train", cache=cache)
    return TransferSet.from_arrays(split.inputs(), labels=split.labels.tolist(), example_ids=split.example_ids())


def evaluation(*, cache: Path = DEFAULT_CACHE) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Give the 10,000 test images, float32 [example, pixel] from 0 to 1, and their labels, int64 [example]."""
    split = read_split("test", cache=cache)
    return split.inputs(), split.labels.astype(np.int64)


def without_classes(*, transfer_set: TransferSet, classes: Sequence[int]) -> Ids:
    """Give the ids of all examples but those of some classes.

    Raises
    ------
    JobError
        The transfer set has no labels.
    """
    return transfer_set.example_ids[~_is_of(transfer_set, classes)]


def of_classes(*, transfer_set: TransferSet, classes: Sequence[int]) -> Ids:
    """Give the ids of the examples of some classes alone.

    Raises
    ------
    JobError
        The transfer set has no labels.
    """
    return transfer_set.example_ids[_is_of(transfer_set, classes)]


def drawn_at_random(*, transfer_set: TransferSet, num_examples: int, seed: int) -> Ids:
    """Draw examples at random, without looking at their labels; give their ids in the transfer set's order.

    Raises
    ------
    JobError
        There are not that many.
    """
    if not 0 < num_examples <= len(transfer_set):
        raise JobError(f"num_examples is {num_examples}; expected 1 to {len(transfer_set)}")
    drawn = np.random.default_rng(seed).choice(len(transfer_set), size=num_examples, replace=False)
    return transfer_set.example_ids[np.sort(drawn)]


def _is_of(transfer_set: TransferSet, classes: Sequence[int]) -> npt.NDArray[np.bool_]:
    if transfer_set.labels is None:
        raise JobError("the transfer set has no labels, so its classes are unknown; give it labels")
    return np.isin(transfer_set.labels, classes)
