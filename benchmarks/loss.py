"""What a loss adds to a training step over hard labels: plain torch's soft cross-entropy, and ours.

Whole steps (forward, loss, backward, SGD) of a student with 1,000 classes, batches of 256, one torch thread, by
processor time. Soft targets lie in memory: as float32 logits, as uint8 codes, and as spectral codes. The step over hard
labels runs under two names, at both ends of each round: how far the two are apart is what the machine cannot tell.
"""

from __future__ import annotations

__all__ = ["run"]

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

ROUNDS: Final = 11
STEPS: Final = 4
BATCH_SIZE: Final = 256
NUM_CLASSES: Final = 1000
NUM_PILOT_ROWS: Final = 2048
TEACHER_WIDTH: Final = 64
TEMPERATURES: Final = (1.0, 4.0)

Loss = Callable[[Tensor], Tensor]


def run() -> list[dict[str, Any]]:
    """Measure the loss alone, an MLP and a small CNN, by processor time."""
    torch.manual_seed(0)
    return [
        row
        for name, student in (("loss alone", nn.Identity()), ("MLP 784-800-800", _mlp()), ("small CNN", _cnn()))
        for temperature in TEMPERATURES
        for row in _compare(name, student, temperature)
    ]


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
    losses = _losses(temperature)
    timings = interleaved(
        {name: _steps(student, loss) for name, loss in losses.items()},
        rounds=ROUNDS,
        warm_up=2,
        clock=time.process_time,
    )
    extra = {name: _milliseconds(timing) - _milliseconds(timings["hard labels"]) for name, timing in timings.items()}
    return [
        {
            "student": title,
            "temperature": temperature,
            "loss": name,
            "step_ms": _milliseconds(timing),
            "over_hard_labels_ms": extra[name],
            "of_what_plain_torch_adds": extra[name] / extra["plain torch"],
        }
        for name, timing in timings.items()
    ]


def _steps(student: nn.Module, loss: Loss) -> Callable[[], None]:
    inputs = torch.rand(BATCH_SIZE, 1, 28, 28)
    if isinstance(student, nn.Identity):
        inputs = torch.randn(BATCH_SIZE, NUM_CLASSES).requires_grad_()
    optimizer = torch.optim.SGD([inputs, *student.parameters()] if inputs.requires_grad else student.parameters(), 1e-3)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(student(inputs)).backward()
            optimizer.step()

    return steps


def _milliseconds(timing: Timing) -> float:
    return 1000 * timing.median / STEPS
