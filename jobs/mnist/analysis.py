"""What the results say: means, spreads and shares, pure functions of the results document."""

from __future__ import annotations

__all__ = ["Summary", "excess", "gap_recovered", "summaries_by_temperature", "summarise"]

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.mnist.results import Student
from kdcache.errors import JobError


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean and spread over seeds.

    Parameters
    ----------
    mean : float
    deviation : float
        Sample standard deviation (divisor: count - 1); NaN of a single value.
    low, high : float
        Smallest and largest.
    count : int
    """

    mean: float
    deviation: float
    low: float
    high: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Summarise one or more values.

    Raises
    ------
    JobError
        There are none.
    """
    if not values:
        raise JobError("there are no values to summarise; expected one a seed")
    return Summary(
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else math.nan,
        low=min(values),
        high=max(values),
        count=len(values),
    )


def gap_recovered(*, hard: float, soft: float, teacher: float) -> float:
    """Give the share of the gap from hard labels to teacher that soft targets close: (hard - soft) / (hard - teacher).

    Raises
    ------
    JobError
        The teacher is no better than the student on hard labels, so there is no gap.
    """
    if not teacher < hard:
        raise JobError(f"the teacher makes {teacher:g} errors and the student on hard labels {hard:g}: there is no gap")
    return (hard - soft) / (hard - teacher)


def summaries_by_temperature(students: Sequence[Student]) -> dict[float, Summary]:
    """Summarise test errors, temperature by temperature, the lowest first."""
    errors = _errors(students)
    return {temperature: summarise(list(errors[temperature].values())) for temperature in sorted(errors)}


def excess(students: Sequence[Student], *, over: float) -> dict[float, Summary]:
    """Summarise, for every temperature, the errors a student makes more than the one of the same seed at another.

    Students of one seed begin with the same weights and see the same batches, so that these differences vary less than
    the errors themselves.

    Parameters
    ----------
    students : sequence of Student
        Every seed at every temperature.
    over : float
        The temperature that all are compared to.
    """
    errors = _errors(students)
    return {
        temperature: summarise([count - errors[over][seed] for seed, count in errors[temperature].items()])
        for temperature in sorted(errors)
    }


def _errors(students: Sequence[Student]) -> dict[float, dict[int, int]]:
    errors: dict[float, dict[int, int]] = {}
    for student in students:
        if student.temperature is not None:
            errors.setdefault(student.temperature, {})[student.seed] = student.num_errors
    return errors
