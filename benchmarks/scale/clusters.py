"""Tasks a second that Dask's workers and its scheduling path get through, beside the same build in this process."""

from __future__ import annotations

__all__ = ["run"]

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdcache
from kdcache.build import BuildProgress
from kdcache.documents import DaskLocal, ExecutorSpec, InProcess

WORKERS = (1, 2, 4)
NUM_CLASSES = 1_000
NUM_ROWS = 16_384
SHARD_ROWS = 1_024
NUM_TRIVIAL_TASKS = 200


class Trivial(nn.Module):
    """Gives its inputs as logits: all that a task costs is not the teacher's."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Give the inputs back."""
        return inputs


def run() -> list[dict[str, Any]]:
    """Measure builds of a small MLP, and of tiny shards without a teacher to speak of, in this process and on Dask."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 1_200), nn.ReLU(), nn.Linear(1_200, NUM_CLASSES)).eval()
    rows = torch.rand(NUM_ROWS, 64)
    tiny = torch.randn(NUM_TRIVIAL_TASKS * 4, 4)
    executors: list[ExecutorSpec] = [InProcess(), *(DaskLocal.make(num_workers=count) for count in WORKERS)]
    return [
        *(_measure("MLP 64-1200-1000", executor, network, rows, SHARD_ROWS, 256) for executor in executors),
        *(_measure("no teacher, shards of 4 rows", executor, Trivial(), tiny, 4, 2) for executor in executors),
    ]


def _measure(
    what: str, executor: ExecutorSpec, teacher: nn.Module, inputs: Tensor, shard_rows: int, batch_size: int
) -> dict[str, Any]:
    """Time the tasks of a build alone, from the first to the last that is published."""
    folder = Path(tempfile.mkdtemp(prefix="kdcache-bench-"))
    seen: list[tuple[float, int]] = []

    def on_progress(step: BuildProgress) -> None:
        if step.stage == "tasks":
            seen.append((time.perf_counter(), step.done_rows))

    try:
        kdcache.build_cache(
            folder / "cache", kdcache.TransferSet.from_arrays(inputs, digest_inputs=False), {"teacher": teacher},
            shard_rows=shard_rows, batch_size=batch_size, num_pilot_rows=shard_rows, executor=executor,
            on_progress=on_progress,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    seconds = seen[-1][0] - seen[0][0]
    return {
        "what": what,
        "executor": f"{executor.num_workers} Dask worker(s)" if isinstance(executor, DaskLocal) else "in process",
        "tasks": len(inputs) // shard_rows,
        "seconds": seconds,
        "tasks_per_second": len(inputs) / shard_rows / seconds,
        "rows_per_second": len(inputs) / seconds,
    }
