"""Order: in which order an epoch visits its examples."""

from __future__ import annotations

__all__ = ["epoch_order"]

import hashlib

import numpy as np


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Give the permutation of an epoch: a pure function of its arguments, the same on every machine.

    Parameters
    ----------
    num_examples : int
    seed, epoch : int
        At least 0.

    Returns
    -------
    ndarray [example] int64
        A permutation of 0 .. num_examples - 1, drawn with Philox keyed by BLAKE2b of (seed, epoch).
    """
    key = np.frombuffer(hashlib.blake2b(f"order|{seed}|{epoch}".encode(), digest_size=16).digest(), np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)
