"""Training on soft targets alone, the same way in every arm."""

from __future__ import annotations

__all__ = ["batches", "soft_gradient", "train"]

from collections.abc import Iterator
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.students.subjects import Plan, Subject

_CACHE_ELEMENTS: Final = 2**18  # of float32, what a core's own cache holds


def train(
    subject: Subject, soft_targets: Float[Tensor, "row class"], temperature: float, plan: Plan, seed: int
) -> nn.Module:
    """Train a student by Adam on temperature^2 times the cross-entropy with soft targets.

    The seed alone says which weights a student begins with and in which order it sees the rows.

    Parameters
    ----------
    subject : Subject
    soft_targets : Tensor [row, class]
        Of the rows to learn from, already at the temperature; weights that are right on average do.
    temperature : float
    plan : Plan
    seed : int

    Returns
    -------
    nn.Module
        The student, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = subject.student()
    optimizer = torch.optim.Adam(student.parameters(), lr=plan.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=plan.steps)
    order = batches(len(soft_targets), plan.batch_size, plan.steps, seed)
    for rows in order:
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(subject.train_inputs[rows])
        optimizer.zero_grad()
        logits.backward(soft_gradient(logits, soft_targets[rows], temperature))
        optimizer.step()
        schedule.step()
    return student.eval()


def batches(num_rows: int, batch_size: int, steps: int, seed: int) -> Iterator[Int[Tensor, " row"]]:
    """Give the rows of each step: every row once before any comes again, in an order that the seed says."""
    generator = torch.Generator().manual_seed(seed)
    num_orders = -(-steps * batch_size // num_rows)
    order = torch.cat([torch.randperm(num_rows, generator=generator) for _ in range(num_orders)])
    yield from order[: steps * batch_size].split(batch_size)


@torch.no_grad()
def soft_gradient(
    logits: Float[Tensor, "row class"], soft_targets: Float[Tensor, "row class"], temperature: float
) -> Float[Tensor, "row class"]:
    """Give the gradient of temperature^2 times the mean over rows of the cross-entropy with soft targets.

    With q = softmax(logits / temperature) the cross-entropy is -sum p log q, and its gradient temperature (s q - p) /
    rows with s = sum p (Hinton, Vinyals and Dean 2015, equation 2). Computed without the loss and a few rows at a time,
    which halves the time of a step at 49,152 classes.

    Parameters
    ----------
    logits : Tensor [row, class]
        The student's, at temperature 1.
    soft_targets : Tensor [row, class]
        p, of any floating-point type; they need not sum to 1.
    temperature : float

    Returns
    -------
    Tensor [row, class]
        Of the type of `logits`, summed up in float32.
    """
    gradient = torch.empty_like(logits)
    step = max(1, _CACHE_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        block = slice(start, start + step)
        own = (logits[block].float() / temperature).softmax(dim=1)
        wanted = soft_targets[block].float()
        gradient[block] = own.mul_(wanted.sum(dim=1, keepdim=True)).sub_(wanted).mul_(temperature / len(logits))
    return gradient
