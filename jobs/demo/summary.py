"""What came out of the demo: a table of test errors, and whether the effects that it is to show are there."""

from __future__ import annotations

__all__ = ["Effect", "Row", "find_effects", "score_ensemble", "score_left_out", "score_students", "written"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

import safetensors.torch
import torch
from torch import Tensor

from jobs.demo.data import test_set
from kdcache import SoftTargetCache
from kdcache.jobs import LoadedJob
from kdcache.students import StudentResult

LEFT_OUT: Final = 3
"""The digit that some students never see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    group, name : str
    errors : tuple of float [run]
        Percent of the test set that is wrong, one for each run: a seed, or a draw of examples and a seed.
    left_out_errors : tuple of float [run]
        The same of the test set's 3s alone; empty where 3s were not left out.
    """

    group: str
    name: str
    errors: tuple[float, ...]
    left_out_errors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """An effect that the demo is to show, in pairs of runs that differ in nothing else.

    Parameters
    ----------
    claim : str
    gains : tuple of float [pair]
        By how many points the error falls.
    holds : bool
        Whether it falls, in the mean over pairs, by more than the gains' standard deviation.
    """

    claim: str
    gains: tuple[float, ...]
    holds: bool

    @classmethod
    def between(cls, claim: str, before: Sequence[float], after: Sequence[float]) -> Effect:
        """Compare errors run by run."""
        gains = tuple(one - other for one, other in zip(before, after, strict=True))
        spread = stdev(gains) if len(gains) > 1 else 0
        return cls(claim=claim, gains=gains, holds=fmean(gains) > spread)

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        num_falls = sum(gain > 0 for gain in self.gains)
        return (
            f"{verdict}: {self.claim}: {written(self.gains)} points fewer, in {num_falls} of {len(self.gains)} "
            "comparisons"
        )


def written(values: Sequence[float]) -> str:
    """Write the mean over runs, and their standard deviation where they are several."""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def score_ensemble(test_cache: SoftTargetCache) -> dict[str, Row]:
    """Score the teachers, alone and together, from their cached soft targets on the test set."""
    soft_targets = test_cache.read(test_cache.example_ids)
    labels = torch.tensor(test_cache.labels)
    names = test_cache.teacher_names
    alone = tuple(_percent_wrong(soft_targets.probabilities(1.0, teachers=[name]), labels) for name in names)
    geometric = _percent_wrong(soft_targets.probabilities(1.0, mean="geometric"), labels)
    arithmetic = _percent_wrong(soft_targets.probabilities(1.0, mean="arithmetic"), labels)
    return {
        "alone": Row(group="teachers", name="one alone", errors=alone),
        "geometric": Row(group="teachers", name=f"geometric mean of {len(names)}", errors=(geometric,)),
        "arithmetic": Row(group="teachers", name=f"arithmetic mean of {len(names)}", errors=(arithmetic,)),
    }


def score_students(results: Iterable[StudentResult], *, group: str) -> dict[float | None, Row]:
    """Give the students' rows by temperature, hard labels under None; runs stand in the same order in all of them."""
    errors: dict[float | None, list[float]] = {}
    for result in results:
        if result.test is not None:
            errors.setdefault(result.settings.temperature, []).append(100 * result.test.error)
    return {
        temperature: Row(group=group, name=_name_of(temperature), errors=tuple(values))
        for temperature, values in errors.items()
    }


def score_left_out(loaded: LoadedJob, results: Iterable[StudentResult], *, group: str) -> dict[tuple[bool, bool], Row]:
    """Give the rows of students that never saw a 3, by (soft targets or hard labels, bias corrected or not)."""
    inputs, labels = (torch.as_tensor(part) for part in test_set())
    is_left_out = labels == LEFT_OUT
    scores: dict[tuple[bool, bool], list[tuple[str, float, float]]] = {}
    for result in results:
        temperature = result.settings.temperature
        for is_corrected in (False, True):
            logits = _student_logits(loaded, result, inputs, is_corrected=is_corrected)
            error, left_out_error = _percent_wrong(logits, labels), _percent_wrong(logits[is_left_out], LEFT_OUT)
            name = (
                f"{'hard' if temperature is None else 'soft'}, bias corrected"
                if is_corrected
                else _name_of(temperature)
            )
            scores.setdefault((temperature is not None, is_corrected), []).append((name, error, left_out_error))
    return {
        key: Row(
            group=group,
            name=runs[0][0],
            errors=tuple(error for _, error, _ in runs),
            left_out_errors=tuple(error for _, _, error in runs),
        )
        for key, runs in scores.items()
    }


def find_effects(
    teachers: Mapping[str, Row],
    everything: Mapping[float | None, Row],
    few: Mapping[float | None, Row],
    left_out: Mapping[tuple[bool, bool], Row],
) -> list[Effect]:
    """Compare runs of equal seeds and examples; soft targets at every temperature, so that the test chooses none."""
    alone = teachers["alone"].errors
    hard, soft, corrected = left_out[False, False], left_out[True, False], left_out[True, True]
    return [
        Effect.between("the ensemble errs less than its members", alone, teachers["geometric"].errors * len(alone)),
        _soft_effect("soft targets beat hard labels on all examples", everything),
        _soft_effect("soft targets beat hard labels on few examples", few),
        Effect.between(
            "soft targets teach the 3s to students that never saw one (errors on 3s)",
            hard.left_out_errors,
            soft.left_out_errors,
        ),
        Effect.between(
            "bias correction, which needs no labels, helps these students further", soft.errors, corrected.errors
        ),
    ]


def _soft_effect(claim: str, rows: Mapping[float | None, Row]) -> Effect:
    soft = [row.errors for temperature, row in rows.items() if temperature is not None]
    return Effect.between(claim, rows[None].errors * len(soft), [error for errors in soft for error in errors])


def _name_of(temperature: float | None) -> str:
    return "hard labels" if temperature is None else f"soft, temperature {temperature:g}"


def _student_logits(loaded: LoadedJob, result: StudentResult, inputs: Tensor, *, is_corrected: bool) -> Tensor:
    (sweep,) = (sweep for sweep in loaded.job.students if sweep.name == result.sweep)
    student = loaded.make(sweep)
    student.load_state_dict(safetensors.torch.load_file(result.weights))
    with torch.no_grad():
        logits: Tensor = student.eval()(inputs)
    return logits + torch.tensor(result.bias) if is_corrected and result.bias else logits


def _percent_wrong(scores: Tensor, labels: Tensor | int) -> float:
    """Percent of rows whose largest score [row, class] is not the label's."""
    return 100 * float((scores.argmax(dim=1) != labels).double().mean())
