"""Part B: a student's step with soft targets from a cache over the same step with the teacher's logits in memory."""

from __future__ import annotations

__all__ = ["grouped", "ratios", "run"]

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import kdcache
from benchmarks.streaming.ours import TIERS
from benchmarks.streaming.row_sets import TEACHER, lookup_teacher, mixed_logits
from benchmarks.timing import interleaved

STEPS: Final = 420
"""Steps of each contestant, one a turn: the machine's busy moments last for many, and so hit all alike."""
GROUPS: Final = 7
"""Groups of neighbouring steps, whose medians are compared."""
_WARM_UP_STEPS: Final = 20
BATCH_SIZE: Final = 128
NUM_EXAMPLES: Final = 12_800
_TEMPERATURE: Final = 4.0
_CODECS: Final = {
    "float16": kdcache.Lossless(dtype="float16"),
    "uint8 codes": kdcache.Codes(),
    "spectral": kdcache.Spectral(max_kl=0.0075),
}

Loss = Callable[[Tensor, Any, Tensor], Tensor]
Batches = Callable[[], Iterator[tuple[Tensor, Any]]]


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure an MLP and a small CNN with 1,000 classes, on one torch thread."""
    num_examples = NUM_EXAMPLES // 5 if quick else NUM_EXAMPLES
    logits = mixed_logits(num_examples)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        caches = {name: _cache(Path(folder) / name, logits, codec) for name, codec in _CODECS.items()}
        students = {"MLP 784-800-800-1000": _mlp(), "small CNN": _cnn()}
        return [
            line
            for name, student in students.items()
            for line in _compare(name, student, logits.float(), caches, num_steps=STEPS // 5 if quick else STEPS)
        ]


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, 1000)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 1000),
    )  # fmt: skip


def _cache(folder: Path, logits: Tensor, codec: Any) -> kdcache.SoftTargetCache:
    inputs = kdcache.TransferSet.from_arrays(torch.arange(len(logits)))
    return kdcache.build_cache(folder, inputs, {TEACHER: lookup_teacher(logits)}, codec=codec)


def _ours(outputs: Tensor, soft_targets: Any, labels: Tensor) -> Tensor:
    return kdcache.distillation_loss(outputs, soft_targets, labels, temperature=_TEMPERATURE, soft_weight=0.9)


def _plain(outputs: Tensor, logits: Any, labels: Tensor) -> Tensor:
    soft = torch.softmax(logits / _TEMPERATURE, 1)
    softened = -(soft * torch.log_softmax(outputs / _TEMPERATURE, 1)).sum(1).mean() * _TEMPERATURE**2
    return 0.9 * softened + 0.1 * nn.functional.cross_entropy(outputs, labels)


def _compare(
    name: str, student: nn.Module, logits: Tensor, caches: dict[str, kdcache.SoftTargetCache], *, num_steps: int
) -> list[dict[str, Any]]:
    pictures = torch.rand(len(logits), 1, 28, 28)
    labels = torch.arange(len(logits)) % 1000
    optimizer = torch.optim.SGD(student.parameters(), 1e-3)

    def in_memory() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(logits)).split(BATCH_SIZE):
            yield rows, logits.index_select(0, rows)

    def steps(batches: Batches, loss: Loss) -> Iterator[None]:
        while True:
            for rows, soft_targets in batches():
                optimizer.zero_grad()
                loss(student(pictures.index_select(0, rows)), soft_targets, labels.index_select(0, rows)).backward()
                optimizer.step()
                yield

    contestants = {
        "float32 logits in memory": steps(in_memory, _ours),
        "float32 logits in memory, plain torch's loss": steps(in_memory, _plain),
    }
    for (codec, tier), batches in _streams(caches).items():
        contestants[f"{codec}: {tier}"] = steps(batches, _ours)
    timings = interleaved(
        {one: partial(next, stream) for one, stream in contestants.items()},
        rounds=num_steps, warm_up=_WARM_UP_STEPS, turns=np.random.default_rng(0),
    )  # fmt: skip
    base = grouped(timings["float32 logits in memory"].seconds)
    return [
        {
            "student": name, "soft_targets": one, "step_ms": 1000 * timing.median,
            **ratios(grouped(timing.seconds), base),
        }
        for one, timing in timings.items()
    ]  # fmt: skip


def grouped(seconds: tuple[float, ...]) -> tuple[float, ...]:
    """Give the medians of groups of neighbouring steps."""
    size = len(seconds) // GROUPS
    return tuple(statistics.median(seconds[group * size : (group + 1) * size]) for group in range(GROUPS))


def _streams(caches: dict[str, kdcache.SoftTargetCache]) -> dict[tuple[str, str], Batches]:
    """Give the batches of every codec in every tier; each tier opens the cache anew."""
    streams: dict[tuple[str, str], Batches] = {}
    for codec, cache in caches.items():
        for tier, make in TIERS.items():
            epochs = make(kdcache.open_cache(cache.address), BATCH_SIZE)
            streams[codec, tier] = lambda epochs=epochs: _tensor_rows(epochs(0))  # type: ignore[misc]
    return streams


def _tensor_rows(batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Tensor, Any]]:
    for rows, soft_targets in batches:
        yield torch.as_tensor(rows), soft_targets


def ratios(seconds: tuple[float, ...], base: tuple[float, ...]) -> dict[str, Any]:
    """Give the ratio group by group, against the control of the same group."""
    ratios = sorted(ours / theirs for ours, theirs in zip(seconds, base, strict=True))
    return {"ratio": statistics.median(ratios), "of_groups": [ratios[0], ratios[-1]]}
