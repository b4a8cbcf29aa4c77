"""Training: all students of a sweep, side by side, in one pass over the cache an epoch.

All students see the same batches in the same order; they differ in their initial weights, temperature and soft weight.
All randomness of an epoch comes from the sweep and the epoch's number, so a run that was stopped goes on exactly.
"""

from __future__ import annotations

__all__ = ["EpochLosses", "Loader", "Training", "learning_rate_factor", "make_optimizer"]

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kdcache.devices import move
from kdcache.documents import Optimizer, StudentSweep
from kdcache.soft_targets import SoftTargets
from kdcache.students.lineup import line_up
from kdcache.students.loss import SideBySideLoss
from kdcache.students.side_by_side import SideBySide

Batch = tuple[Any, Tensor | None, SoftTargets]


class Loader(Protocol):
    """Batches of (inputs, labels or None, soft targets), such as a `kdcache.SoftTargetLoader`."""

    def __len__(self) -> int:
        """Count the batches of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches of the epoch that was chosen."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch: the order is a pure function of it."""


class EpochLosses(NamedTuple):
    """Losses of an epoch, means over its rows; one value a student, NaN where a term does not exist."""

    total: list[float]
    soft: list[float]
    hard: list[float]


class Training:
    """Students in training: weights, optimiser, and the number of finished epochs.

    Parameters
    ----------
    sweep : StudentSweep
        Losses, optimiser, schedule and epochs.
    students : SideBySide
        In the order of `line_up`.
    num_batches : int
        Batches an epoch.
    device : torch.device
        Where the students are.

    Notes
    -----
    One optimiser works on all students. SGD with Nesterov momentum, Adam and AdamW compute each parameter from its own
    gradient and state alone, and the students' losses share no parameters, so each student gets what an optimiser of
    its own would give it.
    """

    def __init__(
        self, sweep: StudentSweep, students: SideBySide, *, num_batches: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sweep = sweep
        self.students = students
        self.num_epochs = 0
        self._num_batches = num_batches
        self._device = torch.device(device)
        self._autocast: torch.dtype | None = None if sweep.autocast is None else getattr(torch, sweep.autocast)
        self._optimizer = make_optimizer(sweep.optimizer, students.parameters())
        self._loss = SideBySideLoss(line_up(sweep), divergence=sweep.divergence, mean=sweep.mean, device=device)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def run_epoch(self, batches: Iterable[Batch], *, on_batch: Callable[[int], None] = lambda _: None) -> EpochLosses:
        """Train one epoch.

        Parameters
        ----------
        batches : iterable of (inputs, labels, soft targets)
            The epoch's batches.
        on_batch : callable (number of batches done in this epoch)
        """
        self.students.train(True)
        sums = torch.zeros(3, self.students.num_students, dtype=torch.float64, device=self._device)
        num_rows = 0
        with self._seeded():
            for index, batch in enumerate(batches):
                parts, rows = self._step(batch, self.num_epochs * self._num_batches + index)
                sums += parts.double() * rows
                num_rows += rows
                on_batch(index + 1)
        self.num_epochs += 1
        total, soft, hard = (sums / num_rows).tolist()
        return EpochLosses(total, soft, hard)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the students' and the optimiser's state."""
        return self.students.state(), self._optimizer.state_dict()

    def load_state(self, num_epochs: int, students: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Go on after `num_epochs` epochs with what `state` gave."""
        self.num_epochs = num_epochs
        self.students.load_state(students)
        self._optimizer.load_state_dict(dict(optimizer))

    def _step(self, batch: Batch, step: int) -> tuple[Tensor, int]:
        inputs, labels, soft_targets = batch
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            logits = self.students(move(inputs, self._device))
        parts = self._loss(logits, soft_targets.to(self._device), move(labels, self._device))
        self._optimizer.zero_grad()
        torch.autograd.backward(parts.total.sum())
        factor = learning_rate_factor(self.sweep.optimizer.schedule, step, self.sweep.epochs * self._num_batches)
        for group in self._optimizer.param_groups:
            group["lr"] = self.sweep.optimizer.learning_rate * factor
        self._optimizer.step()
        return torch.stack([part.detach() for part in parts]), logits.shape[1:-1].numel()

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seed torch for this epoch (dropout), and leave the global generators as they were."""
        text = f"epoch|{self.sweep.name}|{self.num_epochs}"
        word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(word)
            yield


def learning_rate_factor(schedule: str, step: int, num_steps: int) -> float:
    """Give the share of the learning rate at a step: 1 at the first, near 0 at the last unless it is constant.

    Parameters
    ----------
    schedule : "constant", "cosine" or "linear"
        Cosine is ``(1 + cos(pi step / num_steps)) / 2``, linear ``1 - step / num_steps``.
    step, num_steps : int
        Steps taken before this one, and of the whole run.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - step / num_steps
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def make_optimizer(options: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Make the optimiser of a sweep, in torch's fused form where the parameters allow it."""
    fused = all(tensor.is_floating_point() and tensor.device.type in {"cpu", "cuda"} for tensor in parameters)
    rate, decay = options.learning_rate, options.weight_decay
    if options.kind == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(
            parameters, lr=rate, momentum=options.momentum, nesterov=nesterov, weight_decay=decay, fused=fused
        )
    kind = torch.optim.Adam if options.kind == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay, fused=fused)
