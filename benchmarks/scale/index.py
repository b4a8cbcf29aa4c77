"""Bytes and seconds of the example table and the id index, which the process that starts a build writes."""

from __future__ import annotations

__all__ = ["run"]

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.store import CacheStore, ExampleTable

NUM_EXAMPLES = (100_000, 1_000_000)


def run() -> list[dict[str, Any]]:
    """Measure tables of string ids without labels and input digests, one row an example."""
    return [_measure(count) for count in NUM_EXAMPLES]


def _measure(count: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="kdcache-bench-"))
    try:
        store = CacheStore.at(folder / "cache")
        table = ExampleTable(
            example_ids=np.array([_example_id(number) for number in range(count)], dtype=object),
            first_row=np.arange(count, dtype=np.int64),
            num_rows=np.ones(count, dtype=np.int32),
        )
        start = time.perf_counter()
        store.objects.publish("examples.parquet", table.to_parquet())
        table_seconds = time.perf_counter() - start
        start = time.perf_counter()
        store.write_index(table)
        index_seconds = time.perf_counter() - start
        sizes = store.sizes()
        table_bytes = store.objects.size("examples.parquet") or 0
        return {
            "examples": count,
            "table_bytes_per_example": table_bytes / count,
            "index_bytes_per_example": (sizes.id_bytes - table_bytes) / count,
            "table_seconds": table_seconds,
            "index_seconds": index_seconds,
        }
    finally:
        shutil.rmtree(folder)


def _example_id(number: int) -> str:
    return f"train/n{number % 1000:08d}/{number:012d}.jpeg"
