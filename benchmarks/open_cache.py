"""Opening a cache: time and memory must not grow with its rows."""

from __future__ import annotations

__all__ = ["run"]

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdcache

ROUNDS = 5
SCRIPT = """
import json, resource, statistics, sys, time
import numpy as np
import kdcache
address, count, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
kdcache.SoftTargetCache  # everything that opening imports is imported
resident = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
before = resident()
seconds = []
for _ in range(rounds):
    start = time.perf_counter()
    cache = kdcache.open_cache(address)
    seconds.append(time.perf_counter() - start)
opened = resident()
start = time.perf_counter()
cache.read(np.random.default_rng(0).integers(0, count, 256))
first_read = time.perf_counter() - start
print(json.dumps({"first_open_seconds": seconds[0], "open_seconds": statistics.median(seconds),
                  "open_kilobytes": opened - before, "first_read_of_256_rows_seconds": first_read,
                  "read_kilobytes": resident() - opened}))
"""


def run() -> list[dict[str, Any]]:
    """Open caches of ten thousand and of ten million synthetic rows in fresh processes."""
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        return [_measure(Path(folder) / str(count), count) for count in (10_000, 10_000_000)]


def _measure(address: Path, count: int) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = torch.arange(count, dtype=torch.float32).view(-1, 1) / count
    transfer_set = kdcache.TransferSet.from_arrays(inputs, digest_inputs=False)
    kdcache.build_cache(address, transfer_set, {"teacher": nn.Linear(1, 4)}, batch_size=2**16)
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(address), str(count), str(ROUNDS)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return {"what": f"{count:,} rows", **json.loads(output)}
