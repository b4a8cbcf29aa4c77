"""Views: reproducible augmentations."""

from __future__ import annotations

__all__ = ["Views", "view_generator"]

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.errors import TransferSetError


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """How views are made from examples.

    Parameters
    ----------
    transform : callable (input, numpy.random.Generator) -> input
        The augmentation. It takes all its randomness from the generator it is given.
    num_views : int
        Views cached for each example, at least 1.
    name : str
        Names the augmentation and its version; a build with another name is another plan.
    seed : int
        Seed of all views.
    """

    transform: Callable[[Any, np.random.Generator], Any]
    num_views: int
    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise TransferSetError(f"num_views is {self.num_views}; at least 1 is needed")


def view_generator(seed: int, example_id: int | str, view_index: int) -> np.random.Generator:
    """Make the generator of one view: a pure function of (seed, example_id, view_index).

    Philox keyed with BLAKE2b of the three, so that neither the order of work nor the number of workers matters.
    """
    kind = "str" if isinstance(example_id, str) else "int"
    text = f"{seed}|{kind}|{example_id}|{view_index}"
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
