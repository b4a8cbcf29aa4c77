"""A sweep from beginning to end: place, train, measure, keep, resume, correct."""

from __future__ import annotations

__all__ = ["Progress", "train_sweep"]

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.devices import choose_device, move
from kdcache.documents import StudentSweep
from kdcache.errors import JobError, NonFiniteLogitsError
from kdcache.students.checkpoints import Checkpoint, CheckpointFile, refuse_other_identity
from kdcache.students.correction import BiasCorrection
from kdcache.students.evaluation import Evaluation, Scores, evaluate
from kdcache.students.lineup import StudentSettings, line_up
from kdcache.students.metrics import MetricsFile
from kdcache.students.results import ResultsFile, StudentResult, write_weights
from kdcache.students.side_by_side import Way, make_students, place_side_by_side
from kdcache.students.training import EpochLosses, Loader, Training

Progress = Callable[[int, int, str], None]
"""Called with (batches done, batches in all, text)."""


def train_sweep(
    sweep: StudentSweep,
    *,
    make_student: Callable[[], nn.Module],
    loader: Loader,
    folder: str | Path,
    identity: Mapping[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    correction: BiasCorrection | None = None,
    device: str = "auto",
    way: Way | None = None,
    checkpoint_epochs: int = 1,
    resume: bool = True,
    progress: Progress = lambda _done, _total, _text: None,
) -> list[StudentResult]:
    """Train the students of a sweep side by side, reading the cache once an epoch for all of them.

    Each student comes out as if it had been trained alone on the same batches (up to floating-point rounding; dropout
    draws other masks). A run that was stopped goes on from its last checkpoint, to the same bits on the same machine
    with the same number of threads; a finished run gives its results again.

    Parameters
    ----------
    sweep : StudentSweep
        Temperatures, soft weights, seeds, losses, optimiser, epochs. Its factory is not called.
    make_student : callable () -> torch.nn.Module
        Makes one student; torch is seeded with the student's seed before.
    loader : SoftTargetLoader
        Or any `Loader`.
    folder : str or Path
        Takes metrics.jsonl, state.pt while training, results.json, and one safetensors file a student.
    identity : mapping, optional
        What else decides the result, as JSON values: the digests of cache and transfer set.
    evaluation : Evaluation, optional
        Examples to test on, every ``sweep.evaluation_epochs``. Nothing is chosen by them.
    correction : BiasCorrection, optional
        Applied after training.
    device : str
        ``auto`` takes cuda where there is one.
    way : "stacked" or "looped", optional
        How students run side by side; by default what is faster.
    checkpoint_epochs : int
        Epochs from one checkpoint to the next.
    resume : bool
        False overwrites an earlier run in the folder.
    progress : callable (batches done, batches in all, text)

    Returns
    -------
    list of StudentResult
        In the order of `line_up`.

    Raises
    ------
    JobError
        The folder holds a run with another sweep or identity; or students cannot be made; or an option is wrong.
    ShapeError
        Students, soft targets and labels do not fit, or labels are needed and missing.
    """
    if checkpoint_epochs < 1:
        raise JobError(f"checkpoint_epochs is {checkpoint_epochs}; at least 1 is needed")
    run = _Run(sweep, Path(folder), {"sweep": sweep.to_mapping(), **(identity or {})}, evaluation, correction)
    total = sweep.epochs * len(loader)
    if not resume:
        run.clear()
    results = run.finished()
    if results is not None:
        progress(total, total, f"{sweep.name}: finished before")
        return results
    training = run.begin(make_student, loader, device=choose_device(device), way=way)
    progress(training.num_epochs * len(loader), total, sweep.name)
    while training.num_epochs < sweep.epochs:
        _train_epoch(run, training, loader, progress)
        if training.num_epochs % checkpoint_epochs == 0 or training.num_epochs == sweep.epochs:
            run.keep(training)
    return run.finish(training)


def _train_epoch(run: _Run, training: Training, loader: Loader, progress: Progress) -> None:
    epoch, sweep = training.num_epochs, training.sweep
    text = f"{sweep.name}: epoch {epoch + 1} of {sweep.epochs}"
    done, total = epoch * len(loader), sweep.epochs * len(loader)
    started = time.perf_counter()
    loader.set_epoch(epoch)
    losses = training.run_epoch(loader, on_batch=lambda batches: progress(done + batches, total, text))
    run.measure(training, losses, seconds=time.perf_counter() - started)


class _Run:
    """The files and fixed circumstances of one sweep's run."""

    def __init__(
        self,
        sweep: StudentSweep,
        folder: Path,
        identity: Mapping[str, Any],
        evaluation: Evaluation | None,
        correction: BiasCorrection | None,
    ) -> None:
        self.sweep = sweep
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.settings = line_up(sweep)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.device = torch.device("cpu")
        self._checkpoints = CheckpointFile(folder / "state.pt")
        self._results = ResultsFile(folder / "results.json")
        self._evaluation = evaluation
        self._correction = correction

    def clear(self) -> None:
        """Forget an earlier run."""
        self._results.delete()
        self._checkpoints.delete()
        self.metrics.keep_epochs(0)

    def finished(self) -> list[StudentResult] | None:
        """Give the results of a finished run of the same identity."""
        found = self._results.read()
        if found is None:
            return None
        refuse_other_identity(found[0], self.identity, self.folder)
        return found[1]

    def begin(
        self, make_student: Callable[[], nn.Module], loader: Loader, *, device: torch.device, way: Way | None
    ) -> Training:
        """Make the students, at their last checkpoint if there is one."""
        self.device = device
        checkpoint = self._checkpoints.read()
        if checkpoint is not None:
            refuse_other_identity(checkpoint.identity, self.identity, self.folder)
            way = checkpoint.way
        self.metrics.keep_epochs(0 if checkpoint is None else checkpoint.num_epochs)
        modules = make_students(make_student, [student.seed for student in self.settings])
        loader.set_epoch(0)
        inputs, _, _ = next(iter(loader))
        students = place_side_by_side(modules, move(inputs, device), device=device, way=way)
        training = Training(self.sweep, students, num_batches=len(loader), device=device)
        if checkpoint is not None:
            training.load_state(checkpoint.num_epochs, checkpoint.students, checkpoint.optimizer)
        return training

    def measure(self, training: Training, losses: EpochLosses, *, seconds: float) -> None:
        """Write the metrics of an epoch."""
        due = training.num_epochs % self.sweep.evaluation_epochs == 0 or training.num_epochs == self.sweep.epochs
        scores = self._scores(training) if due else [None] * len(self.settings)
        self.metrics.append(
            [
                self._line(index, student, training)
                | {
                    "train_loss": losses.total[index],
                    "train_soft_loss": losses.soft[index],
                    "train_hard_loss": losses.hard[index],
                    **_score_fields(scores[index]),
                    "seconds": round(seconds, 3),
                }
                for index, student in enumerate(self.settings)
            ]
        )

    def keep(self, training: Training) -> None:
        """Write a checkpoint."""
        students, optimizer = training.state()
        self._checkpoints.write(
            Checkpoint(
                identity=self.identity,
                num_epochs=training.num_epochs,
                way=training.students.way,
                students=students,
                optimizer=optimizer,
            )
        )

    def finish(self, training: Training) -> list[StudentResult]:
        """Write weights and results, and drop the checkpoint."""
        scores = self._scores(training)
        last = self.metrics.lines()[-len(self.settings) :]
        results = [
            self._result(index, training, train_loss=last[index]["train_loss"], test=scores[index])
            for index in range(len(self.settings))
        ]
        self._results.write(self.identity, results)
        self._checkpoints.delete()
        return results

    def _result(
        self, index: int, training: Training, *, train_loss: float | None, test: Scores | None
    ) -> StudentResult:
        student = self.settings[index]
        module = training.students.module(index)
        weights = self.folder / f"{student.name}.safetensors"
        write_weights(weights, module, {"kdcache.sweep": self.sweep.name, "kdcache.student": student.name})
        bias, corrected_test = self._corrected(module)
        return StudentResult(
            sweep=self.sweep.name,
            student_index=index,
            settings=student,
            weights=weights,
            num_epochs=training.num_epochs,
            train_loss=train_loss,
            test=test,
            bias=bias,
            corrected_test=corrected_test,
        )

    def _corrected(self, module: nn.Module) -> tuple[tuple[float, ...] | None, Scores | None]:
        if self._correction is None:
            return None, None
        try:
            bias = self._correction.bias_of(module, device=self.device)
        except NonFiniteLogitsError:  # this student's training has diverged; the others' results count
            return None, None
        if self._evaluation is None:
            return tuple(bias.tolist()), None
        return tuple(bias.tolist()), self._correction.score(module, bias, self._evaluation, device=self.device)

    def _scores(self, training: Training) -> list[Scores] | list[None]:
        if self._evaluation is None:
            return [None] * len(self.settings)
        return evaluate(training.students, self._evaluation, device=self.device)

    def _line(self, index: int, student: StudentSettings, training: Training) -> dict[str, Any]:
        return {
            "sweep": self.sweep.name,
            "student_index": index,
            "student": student.name,
            "temperature": student.temperature,
            "soft_weight": student.soft_weight,
            "seed": student.seed,
            "epoch": training.num_epochs,
            "learning_rate": training.learning_rate,
        }


def _score_fields(scores: Scores | None) -> dict[str, Any]:
    if scores is None:
        return {}
    return {
        "test_errors": scores.num_errors,
        "test_error": scores.error,
        "test_accuracy": scores.accuracy,
        "test_cross_entropy": scores.cross_entropy,
    }
