"""Evaluation: how students do on labelled examples that they were not trained on."""

from __future__ import annotations

__all__ = ["Evaluation", "Scores", "as_evaluation", "evaluate", "score"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from kdcache.errors import JobError, ShapeError
from kdcache.students.side_by_side import SideBySide

_BLOCK_EXAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Labelled examples.

    Parameters
    ----------
    inputs : Tensor [example, ...]
        As the students take them.
    labels : Tensor [example] or [example, position] int64
        Class indices, one for each row of logits.

    Raises
    ------
    ShapeError
        There are not as many labels as inputs, or none.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) == 0 or len(self.inputs) != len(self.labels):
            raise ShapeError(
                f"the evaluation has {len(self.inputs)} inputs and {len(self.labels)} labels; expected as many of one "
                "as of the other, and at least one"
            )


@dataclass(frozen=True, slots=True)
class Scores:
    """How one student did.

    Parameters
    ----------
    num_errors, num_rows : int
        Rows whose largest logit is not the label's, and all rows.
    cross_entropy : float or None
        With the labels, at temperature 1, in nats a row; None when it is not finite.
    """

    num_errors: int
    num_rows: int
    cross_entropy: float | None

    @property
    def error(self) -> float:
        """Share of wrong rows."""
        return self.num_errors / self.num_rows

    @property
    def accuracy(self) -> float:
        """Share of right rows."""
        return (self.num_rows - self.num_errors) / self.num_rows


def as_evaluation(value: Any) -> Evaluation:
    """Check what an evaluation factory gave: (inputs, labels), as arrays or tensors.

    Raises
    ------
    JobError
        It is something else.
    ShapeError
        There are not as many labels as inputs, or none.
    """
    if isinstance(value, Evaluation):
        return value
    if not (isinstance(value, tuple | list) and len(value) == 2):
        raise JobError(f"the evaluation factory gave a {type(value).__qualname__}; expected a pair (inputs, labels)")
    try:
        inputs, labels = (torch.as_tensor(part) for part in value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"the evaluation's inputs and labels must be arrays or tensors: {error}") from error
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise JobError(f"the evaluation's labels have dtype {labels.dtype}; they must be class indices (int)")
    return Evaluation(inputs, labels.to(torch.int64))


@torch.no_grad()
def evaluate(students: SideBySide, evaluation: Evaluation, *, device: torch.device | str = "cpu") -> list[Scores]:
    """Score all students in evaluation mode; they are left in it.

    Parameters
    ----------
    students : SideBySide
    evaluation : Evaluation
    device : torch.device or str
        Where the students are.

    Returns
    -------
    list of Scores [student]
    """
    students.train(False)
    errors = torch.zeros(students.num_students, dtype=torch.int64, device=device)
    entropy = torch.zeros(students.num_students, dtype=torch.float64, device=device)
    for inputs, labels in _blocks(evaluation, device):
        logits = students(inputs).flatten(1, -2)
        wrong, nats = _count(logits, labels)
        errors += wrong
        entropy += nats
    num_rows = evaluation.labels.numel()
    counted = zip(errors.tolist(), entropy.tolist(), strict=True)
    return [_scores(num_errors, num_rows, nats) for num_errors, nats in counted]


def score(logits: Float[Tensor, "row class"], labels: Int[Tensor, " row"]) -> Scores:
    """Score one student's logits."""
    wrong, nats = _count(logits.unsqueeze(0), labels)
    return _scores(int(wrong), labels.numel(), float(nats))


def _scores(num_errors: int, num_rows: int, nats: float) -> Scores:
    return Scores(num_errors, num_rows, nats / num_rows if math.isfinite(nats) else None)


def _count(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[1] != labels.numel():
        raise ShapeError(f"students give {logits.shape[1]} rows of logits for {labels.numel()} labels")
    repeated = labels.flatten().expand(len(logits), -1)
    wrong = (logits.argmax(dim=2) != repeated).sum(dim=1)
    nats = functional.cross_entropy(logits.flatten(0, 1).float(), repeated.flatten(), reduction="none")
    return wrong, nats.view(len(logits), -1).double().sum(dim=1)


def _blocks(evaluation: Evaluation, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(evaluation.inputs), _BLOCK_EXAMPLES):
        block = slice(start, start + _BLOCK_EXAMPLES)
        yield evaluation.inputs[block].to(device), evaluation.labels[block].to(device)
