"""Measuring trained students: test errors digit by digit, before and after the label-free bias correction."""

from __future__ import annotations

__all__ = ["CORRECTED", "Measuring", "measure"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from jobs.mnist.data import read_split
from jobs.mnist.results import ByDigit, CacheFigures, Correction, Results, Student
from jobs.mnist.train_teacher import as_inputs, load_teacher
from kdcache import SoftTargetCache
from kdcache.errors import IncompleteCacheError
from kdcache.jobs import LoadedJob, make
from kdcache.report import read_metrics
from kdcache.students import StudentResult, match_class_frequencies, train_job

CORRECTED: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "without-3": ((3,),),
    "only-7-8": ((7, 8), (0, 1, 2, 3, 4, 5, 6, 9)),
}
"""The classes whose biases are set, for each sweep that is corrected: one or more ways."""

_BLOCK_EXAMPLES = 1000


def measure(loaded: LoadedJob, cache: SoftTargetCache, *, teacher: Path, out: Path) -> Results:
    """Measure the job's students, all of them trained.

    Parameters
    ----------
    loaded : LoadedJob
    cache : SoftTargetCache
        That they were trained from.
    teacher : Path
        The teacher's checkpoint.
    out : Path
        The folder that the students were written to.

    Raises
    ------
    IncompleteCacheError
        The cache is not finished.
    """
    train, test = read_split("train"), read_split("test")
    measuring = Measuring(
        training_images=as_inputs(train.images),
        frequencies=torch.from_numpy(np.bincount(train.labels, minlength=10) / len(train)),
        test_images=as_inputs(test.images),
        test_labels=torch.from_numpy(test.labels.astype(np.int64)),
    )
    factories = {sweep.name: sweep for sweep in loaded.job.students}
    students = []
    for result in train_job(loaded, out=out):
        module = make(factories[result.sweep], loaded.folder)
        module.load_state_dict(safetensors.torch.load_file(result.weights))
        students.append(measuring.student(result, module.eval(), lowest=_lowest_num_errors(result)))
    return Results.make(
        num_test_by_digit=_by_digit(measuring.test_labels),
        teacher_errors_by_digit=measuring.errors_by_digit(_logits(load_teacher(teacher), measuring.test_images)),
        cache=_cache_figures(cache),
        students=tuple(students),
    )


class Measuring:
    """What students are measured with.

    Parameters
    ----------
    training_images : Tensor [example, pixel]
        For the bias correction; it sees no labels of them.
    frequencies : Tensor [class]
        Of the classes in the training data.
    test_images : Tensor [example, pixel]
    test_labels : Tensor [example] int64
    """

    def __init__(
        self, *, training_images: Tensor, frequencies: Tensor, test_images: Tensor, test_labels: Tensor
    ) -> None:
        self.training_images = training_images
        self.frequencies = frequencies
        self.test_images = test_images
        self.test_labels = test_labels

    def student(self, result: StudentResult, module: nn.Module, *, lowest: int) -> Student:
        """Measure one student."""
        test_logits = _logits(module, self.test_images)
        ways = CORRECTED.get(result.sweep, ())
        training_logits = _logits(module, self.training_images) if ways else torch.empty(0)
        return Student.make(
            sweep=result.sweep,
            temperature=result.settings.temperature,
            soft_weight=result.settings.soft_weight,
            seed=result.settings.seed,
            num_epochs=result.num_epochs,
            errors_by_digit=self.errors_by_digit(test_logits),
            lowest_num_errors=lowest,
            corrections=tuple(self.correction(test_logits, training_logits, classes) for classes in ways),
        )

    def correction(self, test_logits: Tensor, training_logits: Tensor, classes: Sequence[int]) -> Correction:
        """Set the biases of some classes from all training images, unlabelled, and the classes' frequencies."""
        bias = match_class_frequencies(training_logits, self.frequencies, classes=classes)
        return Correction.make(
            classes=tuple(classes),
            bias=tuple(round(value, 4) for value in bias[list(classes)].tolist()),
            errors_by_digit=self.errors_by_digit(test_logits + bias),
        )

    def errors_by_digit(self, logits: Tensor) -> ByDigit:
        """Count test errors, digit by digit."""
        return _by_digit(self.test_labels[logits.argmax(dim=1) != self.test_labels])


@torch.no_grad()
def _logits(module: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([module(block) for block in images.split(_BLOCK_EXAMPLES)])


def _by_digit(labels: Tensor) -> ByDigit:
    return tuple(torch.bincount(labels, minlength=10).tolist())


def _lowest_num_errors(result: StudentResult) -> int:
    lines: list[dict[str, Any]] = read_metrics(result.weights.with_name("metrics.jsonl"))
    own = (line for line in lines if line["student"] == result.name)
    return min(int(line["test_errors"]) for line in own if "test_errors" in line)


def _cache_figures(cache: SoftTargetCache) -> CacheFigures:
    if cache.complete is None:
        raise IncompleteCacheError(f"cache {cache.address} is not complete; run `python -m jobs.mnist` to finish it")
    (teacher,) = cache.complete.teachers
    return CacheFigures.make(
        num_examples=cache.num_examples,
        num_bytes=teacher.num_bytes,
        temperatures=teacher.certificate.temperatures,
        mean_kl=teacher.certificate.mean_kl,
        max_kl=teacher.certificate.max_kl,
    )
