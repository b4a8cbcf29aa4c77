"""Student step time: soft targets from the cache over the same step with the teachers' logits already in memory."""

from __future__ import annotations

__all__ = ["run"]

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdcache
from benchmarks.timing import interleaved

ROUNDS = 7
BATCH_SIZE = 128
NUM_EXAMPLES = 12_800


def run() -> list[dict[str, Any]]:
    """Measure an MLP and a small CNN, with 10 and with 1,000 classes, all on one torch thread."""
    pictures = torch.rand(NUM_EXAMPLES, 1, 28, 28)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        return [
            _compare(f"{name}, {num_classes:,} classes", student(num_classes), pictures, num_classes, Path(folder))
            for num_classes in (10, 1000)
            for name, student in (("MLP 784-800-800", _mlp), ("small CNN", _cnn))
        ]


def _mlp(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, num_classes)
    )


def _cnn(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, num_classes),
    )  # fmt: skip


def _teacher(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))


def _compare(title: str, student: nn.Module, pictures: Tensor, num_classes: int, folder: Path) -> dict[str, Any]:
    teacher = _teacher(num_classes)
    transfer_set = kdcache.TransferSet.from_arrays(pictures, labels=torch.arange(len(pictures)) % num_classes)
    cache = kdcache.build_cache(folder / title, transfer_set, {"teacher": teacher})
    loader = kdcache.SoftTargetLoader(cache, transfer_set, batch_size=BATCH_SIZE)
    with torch.inference_mode():
        logits = teacher(pictures)
    labels = torch.arange(len(pictures)) % num_classes
    optimizer = torch.optim.SGD(student.parameters(), 1e-3)

    def in_memory() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for rows in torch.randperm(len(pictures)).split(BATCH_SIZE):
            yield pictures.index_select(0, rows), labels[rows], logits.index_select(0, rows)

    def epoch(batches: Iterable[tuple[Any, Any, Any]]) -> None:
        for inputs, hard, soft in batches:
            optimizer.zero_grad()
            kdcache.distillation_loss(student(inputs), soft, hard, temperature=4.0, soft_weight=0.9).backward()
            optimizer.step()

    timings = interleaved({"memory": lambda: epoch(in_memory()), "cache": lambda: epoch(loader)}, rounds=ROUNDS)
    steps = NUM_EXAMPLES / BATCH_SIZE
    return {
        "what": title,
        "memory_step_ms": 1000 * timings["memory"].median / steps,
        "cache_step_ms": 1000 * timings["cache"].median / steps,
        "ratio": timings["cache"].median / timings["memory"].median,
    }
