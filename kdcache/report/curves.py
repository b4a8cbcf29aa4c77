"""What a picture of students shows: the last test error of each, gathered into curves over the temperature."""

from __future__ import annotations

__all__ = ["Curve", "Point", "gather_curves"]

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Point:
    """Test errors of the students that differ in their seed alone.

    Parameters
    ----------
    temperature : float or None
        None where the temperature plays no part.
    errors : tuple of float [seed]
        Shares of wrong rows, 0 to 1.
    """

    temperature: float | None
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.errors) / len(self.errors)

    @property
    def low(self) -> float:
        """The best seed's."""
        return min(self.errors)

    @property
    def high(self) -> float:
        """The worst seed's."""
        return max(self.errors)


@dataclass(frozen=True, slots=True)
class Curve:
    """Students of one sweep and soft weight.

    Parameters
    ----------
    sweep : str
    soft_weight : float
        0 for a baseline on hard labels.
    points : tuple of Point
        By rising temperature; a single one without a temperature for a baseline, and for logit matching.
    """

    sweep: str
    soft_weight: float
    points: tuple[Point, ...]

    @property
    def is_level(self) -> bool:
        """Whether the temperature plays no part."""
        return self.points[0].temperature is None

    @property
    def temperatures(self) -> list[float]:
        """Temperatures of the points that have one."""
        return [point.temperature for point in self.points if point.temperature is not None]


def gather_curves(lines: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Gather metrics lines into curves, with each student's last tested epoch.

    Parameters
    ----------
    lines : iterable of mapping
        As in metrics.jsonl; those without a test error are passed over.

    Returns
    -------
    list of Curve
        By sweep in the order of the lines, then by soft weight.
    """
    last: dict[tuple[Any, ...], float] = {}
    for line in lines:
        if line.get("test_error") is not None:
            key = (line["sweep"], line["soft_weight"], line["temperature"], line["seed"])
            last[key] = line["test_error"]
    errors: dict[tuple[str, float], dict[float | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (sweep, soft_weight, temperature, _), error in last.items():
        errors[sweep, soft_weight][temperature].append(error)
    sweeps = list(dict.fromkeys(sweep for sweep, _ in errors))
    return [
        Curve(sweep, weight, _points(errors[sweep, weight]))
        for sweep, weight in sorted(errors, key=lambda key: (sweeps.index(key[0]), key[1]))
    ]


def _points(errors: Mapping[float | None, list[float]]) -> tuple[Point, ...]:
    ordered = sorted(errors, key=lambda temperature: -1.0 if temperature is None else temperature)
    return tuple(Point(temperature, tuple(errors[temperature])) for temperature in ordered)
