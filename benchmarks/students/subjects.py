"""What students learn from: inputs beside a teacher's logits, split by example."""

from __future__ import annotations

__all__ = ["Plan", "Subject", "thinned"]

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and on how much students are trained.

    Parameters
    ----------
    num_train, num_held_out : int
        Rows to learn from, at most, and rows to measure on.
    steps : int
        Updates of a student.
    batch_size : int
        Rows an update.
    learning_rate : float
        Adam's, at the first step; it falls to 0 along a straight line.
    seeds : int
        Students an arm and temperature.
    temperatures : tuple of float
        At which students learn.
    """

    num_train: int
    num_held_out: int
    steps: int
    batch_size: int = 64
    learning_rate: float
    seeds: int
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A teacher's logits, a student's inputs, and how to make a student.

    Parameters
    ----------
    name, title : str
        For the results file and for people.
    train_inputs, held_out_inputs : Tensor [row, ...]
        What the student sees; no example gives rows to both.
    train_logits, held_out_logits : Tensor [row, class]
        float32, the teacher's.
    held_out_labels : Tensor [row], optional
        True classes, int64; -1 where a row has none. None where nobody knows them.
    student : callable
        Makes a student, from torch's global generator, that gives logits [row, class] for inputs [row, ...].
    """

    name: str
    title: str
    train_inputs: Tensor
    held_out_inputs: Tensor
    train_logits: Float[Tensor, "row class"]
    held_out_logits: Float[Tensor, "row class"]
    held_out_labels: Int[Tensor, " row"] | None
    student: Callable[[], nn.Module]

    @property
    def num_classes(self) -> int:
        """Classes of the teacher."""
        return self.train_logits.shape[1]


def thinned(rows: Int[Tensor, " row"], most: int) -> Int[Tensor, " row"]:
    """Give at most so many of the rows, evenly spread.

    Examples
    --------
    >>> thinned(torch.arange(9), 3).tolist()
    [0, 4, 8]
    """
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=torch.float64).round().long()]
