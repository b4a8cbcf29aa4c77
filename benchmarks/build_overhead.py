"""Build time over bare teacher inference: the same batches, the same teacher, with and without a cache being made."""

from __future__ import annotations

__all__ = ["run"]

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdcache
from benchmarks.teachers import efficientnet, pictures
from benchmarks.timing import interleaved

ROUNDS = 3


def run() -> list[dict[str, Any]]:
    """Measure two teachers: a real image classifier, and a small MLP over which any overhead shows most."""
    shown = pictures.sklearn_photographs()
    inputs = efficientnet.inputs("lite0", shown, pictures.draw_crops(shown, 512))
    rows = torch.rand(60_000, 784)
    return [
        _compare("EfficientNet-Lite0, 1,000 classes, 512 crops", efficientnet.network(), inputs, batch_size=32),
        _compare("MLP 784-1200-1200-10, 60,000 rows", _mnist_mlp(), rows, batch_size=256),
    ]


def _mnist_mlp() -> nn.Module:
    """Give the paper's MNIST teacher's shape, untrained: its cost is what counts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10)).eval()


@torch.inference_mode()
def _bare(teacher: nn.Module, inputs: Tensor, batch_size: int) -> None:
    for batch in inputs.split(batch_size):
        teacher(batch)


def _compare(title: str, teacher: nn.Module, inputs: Tensor, *, batch_size: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="kdcache-bench-"))
    transfer_set = kdcache.TransferSet.from_arrays(inputs)
    transfer_set.digest()  # reading the transfer set once is no part of running a teacher
    numbers = iter(range(1000))

    def build() -> None:
        kdcache.build_cache(folder / str(next(numbers)), transfer_set, {"teacher": teacher}, batch_size=batch_size)

    try:
        timings = interleaved({"bare": lambda: _bare(teacher, inputs, batch_size), "build": build}, rounds=ROUNDS)
    finally:
        shutil.rmtree(folder)
    bare, built = timings["bare"], timings["build"]
    ratios = [one / other for one, other in zip(built.seconds, bare.seconds, strict=True)]
    return {
        "what": title,
        "bare_seconds": bare.median,
        "build_seconds": built.median,
        "ratio": built.median / bare.median,
        "ratio_spread": [min(ratios), max(ratios)],
        "rows_per_second": len(inputs) / built.median,
    }
