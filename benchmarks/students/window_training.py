"""Training students that read windows: the same steps in every arm, and on a GPU one recorded graph for all of them."""

from __future__ import annotations

__all__ = ["Trainer", "learning_rate_at", "soft_gradient_at", "tensor_cores"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.students.kept_rows import RowArm
from benchmarks.students.training import batches
from benchmarks.students.windows import WindowPlan, WindowSubject

_RISE: Final = 1 / 20  # of the steps, over which the learning rate rises
_WARM_UP_STEPS: Final = 3  # before a graph is recorded, as torch asks for

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def soft_gradient_at(
    logits: Float[Tensor, "row class"], soft_targets: Float[Tensor, "row class"], temperature: Float[Tensor, ""]
) -> Float[Tensor, "row class"]:
    """Give `benchmarks.students.training.soft_gradient` of all rows at once; the temperature is a number on the device.

    Made to be compiled into one kernel.
    """
    wanted = soft_targets.float()
    own = (logits.float() / temperature).softmax(dim=1)
    return ((own * wanted.sum(dim=1, keepdim=True) - wanted) * (temperature / len(logits))).to(logits.dtype)


def learning_rate_at(step: int, num_steps: int, highest: float) -> float:
    """Give the learning rate of a step: it rises over a twentieth of the steps, then falls to 0 along a straight line.

    Examples
    --------
    >>> [round(learning_rate_at(step, 40, 1.0), 3) for step in (0, 1, 2, 21, 39)]
    [0.5, 1.0, 1.0, 0.5, 0.026]
    """
    num_rising = max(1, round(num_steps * _RISE))
    return highest * min((step + 1) / num_rising, (num_steps - step) / max(1, num_steps - num_rising))


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let float32 products round their factors to TF32, which changes no bit of those that make soft targets.

    Hidden states and head are bfloat16 numbers, a basis float16 ones, and codes whole numbers up to 2,048.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Trainer:
    """Trains one student after the other in the same memory.

    Parameters
    ----------
    subject : WindowSubject
    plan : WindowPlan
    gradient : callable
        `soft_gradient_at`, compiled or not.

    Attributes
    ----------
    student : nn.Module
        The one trained last.
    """

    def __init__(self, subject: WindowSubject, plan: WindowPlan, gradient: Gradient = soft_gradient_at) -> None:
        self._subject, self._plan, self._gradient = subject, plan, gradient
        device = subject.device
        self.student = self._fresh(0).to(device)
        self._rate = torch.zeros((), device=device)
        self._temperature = torch.ones((), device=device)
        rate = self._rate if device.type == "cuda" else 0.0
        self._optimizer = torch.optim.Adam(
            self.student.parameters(), lr=rate, fused=True, capturable=device.type == "cuda"
        )
        shape = (plan.batch_windows, subject.train.tokens.shape[1])
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._wanted = torch.zeros(shape[0] * shape[1], subject.num_classes, dtype=torch.bfloat16, device=device)
        self._graph = self._recorded() if device.type == "cuda" else None

    def train(self, arm: RowArm, temperature: float, seed: int, learning_rate: float) -> None:
        """Train `student` anew by Adam on temperature^2 times the cross-entropy with soft targets.

        The seed alone says which weights it begins with and in which order it sees the windows.
        """
        plan, device = self._plan, self._subject.device
        self._begin(seed)
        self._temperature.fill_(temperature)
        order = torch.stack(list(batches(len(self._subject.train), plan.batch_windows, plan.steps, seed))).to(device)
        with tensor_cores():
            for step, windows in enumerate(order):
                self._set_rate(learning_rate_at(step, plan.steps, learning_rate))
                torch.index_select(self._subject.train.tokens, 0, windows, out=self._tokens)
                arm.soften_into(self._wanted, windows, temperature)
                if self._graph is None:
                    self._step()
                else:
                    self._graph.replay()

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._subject.student()

    @torch.no_grad()
    def _begin(self, seed: int) -> None:
        for own, fresh in zip(self.student.parameters(), self._fresh(seed).parameters(), strict=True):
            own.copy_(fresh)
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def _set_rate(self, rate: float) -> None:
        if self._graph is None:
            self._optimizer.param_groups[0]["lr"] = rate
        else:
            self._rate.fill_(rate)

    def _step(self) -> None:
        with torch.autocast(self._tokens.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.student(self._tokens).flatten(0, 1)
        self._optimizer.zero_grad(set_to_none=True)
        logits.backward(self._gradient(logits.detach(), self._wanted, self._temperature))
        self._optimizer.step()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """Record a step, which reads and writes the same memory whenever it is replayed."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph
