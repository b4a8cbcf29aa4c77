"""Arms against the full logits, student by student: differences between students of one seed."""

from __future__ import annotations

__all__ = ["Paired", "paired", "scores_of"]

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_STUDENT_T: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Paired:
    """Differences of one score, an arm's students minus those of the full logits, of the same seeds.

    Parameters
    ----------
    differences : tuple of float
        One a seed; two to ten.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.differences)

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the mean over seeds, by Student's t."""
        num_seeds = len(self.differences)
        return _STUDENT_T[num_seeds - 1] * statistics.stdev(self.differences) / math.sqrt(num_seeds)

    @property
    def is_seen(self) -> bool:
        """Whether that interval leaves out 0."""
        return abs(self.mean) > self.half_width


def scores_of(arm: Mapping[str, Any], score: str, temperature: float) -> dict[int, float]:
    """Give an arm's scores at a temperature by seed; empty where it has no students there."""
    return {one["seed"]: one[score] for one in arm["students"] if one["temperature"] == temperature}


def paired(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], score: str, temperature: float) -> Paired:
    """Pair an arm's students with those of the first arm, the full logits.

    Raises
    ------
    ValueError
        The two have students of other seeds.
    """
    own, full = (scores_of(one, score, temperature) for one in (arm, arms[0]))
    if own.keys() != full.keys():
        raise ValueError(
            f"{arm['name']} at temperature {temperature:g} has seeds {sorted(own)}, {arms[0]['name']} {sorted(full)}; "
            "train them again: python -m benchmarks.students"
        )
    return Paired(tuple(own[seed] - full[seed] for seed in sorted(own)))
