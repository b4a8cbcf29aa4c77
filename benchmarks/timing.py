"""Timing: contestants take turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

__all__ = ["Timing", "interleaved"]

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one contestant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest round, in seconds."""
        return min(self.seconds), max(self.seconds)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    turns: np.random.Generator | None = None,
) -> dict[str, Timing]:
    """Time each contestant once a round, after rounds that do not count.

    With `time.process_time` as the clock, what other processes of a busy machine take is left out. With `turns` each
    round has an order of its own: what one leaves to be done beside the next falls on all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warm_up + rounds):
        if turns is not None:
            turns.shuffle(names)
        for name in names:
            start = clock()
            contestants[name]()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
