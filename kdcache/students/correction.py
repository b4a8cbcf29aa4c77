"""Bias correction of trained students on a transfer set's inputs."""

from __future__ import annotations

__all__ = ["BiasCorrection"]

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcache.devices import move
from kdcache.errors import JobError, TransferSetError
from kdcache.students.bias import match_class_frequencies
from kdcache.students.evaluation import Evaluation, Scores, score
from kdcache.transfer_set import TransferSet

_BLOCK_EXAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasCorrection:
    """How students' biases are corrected after training; see `match_class_frequencies`.

    Parameters
    ----------
    transfer_set : TransferSet
        Whose inputs, all of them, the students are run on.
    frequencies : Tensor [class] float64
        Frequency of each class in the training data.
    classes : tuple of int, optional
        The classes to correct; all where absent.
    """

    transfer_set: TransferSet
    frequencies: Float[Tensor, " class"]
    classes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, transfer_set: TransferSet, *, num_classes: int, trained_on: Sequence[Any] | None = None) -> Self:
        """Make the correction of a transfer set with labels.

        Parameters
        ----------
        transfer_set : TransferSet
            Its labels give the frequencies.
        num_classes : int
        trained_on : sequence of example ids, optional
            The examples that students are trained on, where these are not all. If whole classes are missing among
            them, those classes alone are corrected.

        Raises
        ------
        JobError
            The transfer set has no labels, one for each row.
        TransferSetError
            No bias can match the frequencies.
        """
        labels = transfer_set.labels
        if labels is None or int(transfer_set.num_rows.max()) > 1:
            raise JobError(
                "bias_correction takes the classes' frequencies from the transfer set's labels, one label a row; give "
                "the transfer set labels, or leave bias_correction out"
            )
        counts = np.bincount(labels, minlength=num_classes)
        classes = _left_out(transfer_set, counts, trained_on)
        empty = [index for index in classes or range(num_classes) if counts[index] == 0]
        if len(counts) > num_classes or empty:
            raise TransferSetError(
                f"bias_correction needs every class in the transfer set's labels: of {num_classes} classes, {empty} "
                f"have no example, and the largest label is {int(labels.max())}; leave bias_correction out"
            )
        return cls(transfer_set=transfer_set, frequencies=torch.from_numpy(counts / counts.sum()), classes=classes)

    def bias_of(self, student: nn.Module, *, device: torch.device | str = "cpu") -> Float[Tensor, " class"]:
        """Find a student's correction.

        Raises
        ------
        NonFiniteLogitsError
            The student's training has diverged.
        """
        logits = _logits(student, self._inputs(), device)
        return match_class_frequencies(logits, self.frequencies, classes=self.classes).cpu()

    def score(
        self, student: nn.Module, bias: Tensor, evaluation: Evaluation, *, device: torch.device | str = "cpu"
    ) -> Scores:
        """Score a student with its corrected biases."""
        logits = _logits(student, torch.split(evaluation.inputs, _BLOCK_EXAMPLES), device)
        return score(logits.cpu() + bias, evaluation.labels)

    def _inputs(self) -> Iterator[Any]:
        for start in range(0, len(self.transfer_set), _BLOCK_EXAMPLES):
            stop = min(start + _BLOCK_EXAMPLES, len(self.transfer_set))
            yield self.transfer_set.read_inputs(range(start, stop))


def _left_out(
    transfer_set: TransferSet, counts: np.ndarray, trained_on: Sequence[Any] | None
) -> tuple[int, ...] | None:
    if trained_on is None or transfer_set.labels is None:
        return None
    seen = set(transfer_set.labels[transfer_set.indices_of(np.asarray(trained_on))].tolist())
    absent = [index for index in range(len(counts)) if counts[index] > 0 and index not in seen]
    return tuple(absent) or None


@torch.no_grad()
def _logits(student: nn.Module, blocks: Iterable[Any], device: torch.device | str) -> Tensor:
    student.to(device).eval()
    return torch.cat([student(move(block, device)).flatten(0, -2).float() for block in blocks])
