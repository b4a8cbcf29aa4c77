"""What a loss adds to a training step over hard labels: plain torch's soft cross-entropy, and ours.

Training steps (forward, loss, backward, SGD) of a student with 1,000 classes, batches of 256, one torch thread, by
processor time. Of each step only the loss and its backward pass to the logits are timed: the rest leaves the caches as
a step leaves them, and would drown a millisecond in its own fifty. Soft targets lie in memory: as float32 logits, as
uint8 codes, and as spectral codes. Hard labels run under two names, at both ends of each round: how far the two are
apart is what the machine cannot tell. Every difference is taken within a round.

Then three students at three temperatures over the same spectral codes, decoded for each and decoded once.
"""

from __future__ import annotations

__all__ = ["run"]

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

import kdcache
from benchmarks.timing import Timing, interleaved
from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to
from kdcache.documents import Codes, Spectral

ROUNDS: Final = 25
STEPS: Final = 2
BATCH_SIZE: Final = 256
NUM_CLASSES: Final = 1000
NUM_PILOT_ROWS: Final = 2048
TEACHER_WIDTH: Final = 64
TEMPERATURES: Final = (1.0, 4.0)
THREE_TEMPERATURES: Final = (1.0, 2.0, 4.0)

Loss = Callable[[Tensor], Tensor]


def run() -> list[dict[str, Any]]:
    """Measure the loss alone, in steps of an MLP and of a small CNN, and of three students at once."""
    torch.manual_seed(0)
    compared = [
        row
        for name, student in (("loss alone", nn.Identity()), ("MLP 784-800-800", _mlp()), ("small CNN", _cnn()))
        for temperature in TEMPERATURES
        for row in _compare(name, student, temperature)
    ]
    return [*compared, *_three_students(_mlp())]


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, NUM_CLASSES)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, NUM_CLASSES),
    )  # fmt: skip


def _teacher_logits() -> Tensor:
    """Give rows of a network of random weights, spread about as those of a trained one."""
    torch.manual_seed(1)
    hidden = torch.randn(NUM_PILOT_ROWS, TEACHER_WIDTH).relu_()
    return hidden @ torch.randn(TEACHER_WIDTH, NUM_CLASSES) * 0.5


def _coded(logits: Tensor) -> dict[str, kdcache.SoftTargets]:
    codec = codec_for(Codes(), NUM_CLASSES)
    decoders = {"uint8 codes": Decoder(codec, parameters_to(codec.fit(logits), "cpu"))}
    spectral, parameters = SpectralCodec.fitted(Spectral(max_kl=0.01), NUM_CLASSES, logits)
    decoders["spectral codes"] = Decoder(spectral, parameters_to(parameters, "cpu"))
    return {
        name: kdcache.SoftTargets((decoder.encode(logits[:BATCH_SIZE]),), (decoder,), ("teacher",))
        for name, decoder in decoders.items()
    }


def _losses(temperature: float) -> dict[str, Loss]:
    logits, labels = _teacher_logits(), torch.arange(BATCH_SIZE) % NUM_CLASSES
    teacher, coded = logits[:BATCH_SIZE].clone(), _coded(logits)

    def hard(student: Tensor) -> Tensor:
        return functional.cross_entropy(student, labels)

    def plain(student: Tensor) -> Tensor:
        soft_targets = torch.softmax(teacher / temperature, 1)
        log_student = torch.log_softmax(student / temperature, 1)
        return -(soft_targets * log_student).sum(1).mean() * temperature * temperature

    def ours(soft_targets: Tensor | kdcache.SoftTargets, soft_weight: float) -> Loss:
        return lambda student: kdcache.distillation_loss(
            student, soft_targets, labels, temperature=temperature, soft_weight=soft_weight
        )

    return {
        "hard labels": hard,
        "plain torch": plain,
        "plain torch and hard labels": lambda student: 0.9 * plain(student) + 0.1 * hard(student),
        "ours, float32 logits": ours(teacher, 1.0),
        "ours, float32 logits and hard labels": ours(teacher, 0.9),
        **{f"ours, {name}": ours(soft_targets, 1.0) for name, soft_targets in coded.items()},
        **{f"ours, {name} and hard labels": ours(soft_targets, 0.9) for name, soft_targets in coded.items()},
        "hard labels again": hard,
    }


def _compare(title: str, student: nn.Module, temperature: float) -> list[dict[str, Any]]:
    timings = _timed(student, _losses(temperature))
    ends = zip(timings["hard labels"].seconds, timings["hard labels again"].seconds, strict=True)
    hard = [(first + last) / 2 for first, last in ends]
    extra = {name: _over(timing, hard) for name, timing in timings.items()}
    return [
        {
            "student": title,
            "temperature": temperature,
            "loss": name,
            "loss_ms": _milliseconds(timing.median),
            "over_hard_labels_ms": statistics.median(extra[name]),
            "middle_half_ms": "{:.2f} to {:.2f}".format(*statistics.quantiles(extra[name])[::2]),
            "of_what_plain_torch_adds": statistics.median(extra[name]) / statistics.median(extra[_plain_beside(name)]),
        }
        for name, timing in timings.items()
    ]


def _plain_beside(name: str) -> str:
    return "plain torch and hard labels" if name.endswith("and hard labels") else "plain torch"


def _three_students(student: nn.Module) -> list[dict[str, Any]]:
    spectral = _coded(_teacher_logits())["spectral codes"]

    def three(student: Tensor, soft_targets: kdcache.SoftTargets) -> Tensor:
        losses = [
            kdcache.distillation_loss(student, soft_targets, temperature=temperature, soft_weight=1.0)
            for temperature in THREE_TEMPERATURES
        ]
        return torch.stack(losses).sum()

    timings = _timed(
        student,
        {
            "ours, spectral codes": lambda logits: three(logits, spectral),
            "ours, spectral codes decoded once": lambda logits: three(logits, spectral.decoded()),
        },
    )
    return [
        {
            "student": "three losses, MLP",
            "temperature": "1, 2, 4",
            "loss": name,
            "loss_ms": _milliseconds(timing.median),
        }
        for name, timing in timings.items()
    ]


class _Stopwatch:
    """Processor time of what it runs, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def run(self, timed: Callable[[], None]) -> None:
        start = time.process_time()
        timed()
        self.seconds += time.process_time() - start


def _timed(student: nn.Module, losses: dict[str, Loss]) -> dict[str, Timing]:
    stopwatch = _Stopwatch()
    contestants = {name: _steps(student, loss, stopwatch) for name, loss in losses.items()}
    return interleaved(contestants, rounds=ROUNDS, warm_up=2, clock=lambda: stopwatch.seconds)


def _steps(student: nn.Module, loss: Loss, stopwatch: _Stopwatch) -> Callable[[], None]:
    inputs = torch.rand(BATCH_SIZE, 1, 28, 28)
    if isinstance(student, nn.Identity):
        inputs = torch.randn(BATCH_SIZE, NUM_CLASSES).requires_grad_()
    optimizer = torch.optim.SGD([inputs, *student.parameters()] if inputs.requires_grad else student.parameters(), 1e-3)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            made = student(inputs)
            logits = made.detach().requires_grad_()
            stopwatch.run(lambda: loss(logits).backward())  # noqa: B023 - called at once
            made.backward(logits.grad)
            optimizer.step()

    return steps


def _over(timing: Timing, hard: list[float]) -> list[float]:
    return [_milliseconds(seconds - base) for seconds, base in zip(timing.seconds, hard, strict=True)]


def _milliseconds(seconds: float) -> float:
    return 1000 * seconds / STEPS
