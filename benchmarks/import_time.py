"""Import time: what kdcache adds to what is imported anyway."""

from __future__ import annotations

__all__ = ["run"]

import statistics
import subprocess
import sys
from typing import Any

ROUNDS = 7
CASES = {
    "import kdcache": ("pass", "import kdcache"),
    "kdcache.Codes (documents, no torch)": ("pass", "import kdcache; kdcache.Codes"),
    "kdcache.distillation_loss, beyond torch": ("import torch", "import kdcache; kdcache.distillation_loss"),
    "kdcache.open_cache, beyond torch": ("import torch", "import kdcache; kdcache.open_cache"),
    "kdcache.build_cache, beyond torch": (
        "import torch, torch.utils.data", "import kdcache; kdcache.build_cache",
    ),
}  # fmt: skip
SCRIPT = """
import sys, time
{before}
start = time.perf_counter()
{measured}
print(time.perf_counter() - start, *sorted({{"torch", "dask", "distributed", "zarr", "pyarrow"}} & set(sys.modules)))
"""


def run() -> list[dict[str, Any]]:
    """Time each import in fresh processes, after one that warms the file cache."""
    return [_measure(name, *case) for name, case in CASES.items()]


def _measure(name: str, before: str, measured: str) -> dict[str, Any]:
    script = SCRIPT.format(before=before, measured=measured)
    outputs = [
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(ROUNDS + 1)
    ][1:]
    return {
        "what": name,
        "seconds": statistics.median(float(output[0]) for output in outputs),
        "loads": " ".join(outputs[0][1:]) or "none of them",
    }
