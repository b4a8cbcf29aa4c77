"""Line-up: which students a sweep trains, each once."""

from __future__ import annotations

__all__ = ["StudentSettings", "line_up"]

import itertools
from dataclasses import dataclass

from kdcache.documents import StudentSweep


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSettings:
    """What tells one student of a sweep from another.

    Parameters
    ----------
    temperature : float or None
        Of the soft term; None where it plays no part: on hard labels alone, and in logit matching.
    soft_weight : float
        Weight of the soft term, 0 to 1.
    seed : int
        Of the initial weights.
    """

    temperature: float | None
    soft_weight: float
    seed: int

    @property
    def name(self) -> str:
        """A short name, safe as a file's: ``t4-w0.9-s0``, or ``hard-s0`` on hard labels alone."""
        if self.soft_weight == 0:
            return f"hard-s{self.seed}"
        temperature = "" if self.temperature is None else f"t{_number(self.temperature)}-"
        return f"{temperature}w{_number(self.soft_weight)}-s{self.seed}"


def line_up(sweep: StudentSweep) -> tuple[StudentSettings, ...]:
    """List the students of a sweep: every combination, in the sweep's order, without those that would be equal.

    On hard labels alone (soft weight 0), and in logit matching, the temperature plays no part; one student a seed then
    stands for all temperatures.
    """
    combinations = itertools.product(sweep.temperatures, sweep.soft_weights, sweep.seeds)
    settings = (
        StudentSettings(
            temperature=None if weight == 0 or sweep.divergence == "logit-matching" else temperature,
            soft_weight=weight,
            seed=seed,
        )
        for temperature, weight, seed in combinations
    )
    return tuple(dict.fromkeys(settings))


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
