"""The cost of records: publishing, listing, reading, finalising, and asking for the status of a build."""

from __future__ import annotations

__all__ = ["run"]

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdcache
from kdcache.build import read_status
from kdcache.build.executors import InProcessExecutor
from kdcache.build.finalise import finalise
from kdcache.build.work import Work
from kdcache.documents import Record
from kdcache.store import CacheStore, layout

NUM_RECORDS = (1_000, 10_000, 100_000)
NUM_PUBLISHED = 1_000
NUM_CLASSES = 1_000
SHARD_ROWS = 8
"""Few: it is the number of shards that costs."""
ROUNDS = 3


class OnlyRecords(InProcessExecutor):
    """Builds one real shard, and gives every other shard a record like its own: what costs time is their number."""

    def run(self, work: Work, tasks: Mapping[str, Sequence[int]], on_record: Callable[[Record], None]) -> None:
        """Publish the records; the first ones durably and timed, the others as plain files."""
        (name,) = tasks
        (first,) = (item for item in work.run(name, [0]) if isinstance(item, Record))
        self.record_bytes = len(first.to_json())
        store = CacheStore.at(work.address)
        folder = Path(work.address) / layout.records_folder(name)
        self.publish_seconds = []
        for shard in list(tasks[name])[1:]:
            record = first.model_copy(update={"shard_index": shard})
            if shard <= NUM_PUBLISHED:
                start = time.perf_counter()
                store.publish_record(record)
                self.publish_seconds.append(time.perf_counter() - start)
            else:
                (folder / f"{shard}.json").write_bytes(record.to_json())
        on_record(first)


def run() -> list[dict[str, Any]]:
    """Measure caches of a thousand, ten thousand and a hundred thousand records on the local file system."""
    return [_measure(count) for count in NUM_RECORDS]


def _measure(count: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="kdcache-bench-"))
    try:
        executor = _build(folder / "cache", count)
        store = CacheStore.at(folder / "cache")
        plan = store.plans()[0]
        return {
            "records": count,
            "record_bytes": executor.record_bytes,
            "publish_seconds_each": statistics.median(executor.publish_seconds),
            "list_seconds": _seconds(lambda: list(store.objects.list(layout.records_folder("teacher")))),
            "read_seconds": _seconds(lambda: store.records("teacher")),
            "status_seconds": _seconds(lambda: read_status(folder / "cache")),
            "finalise_seconds": _seconds(lambda: finalise(store, 0, plan)),
        }
    finally:
        shutil.rmtree(folder)


def _build(address: Path, count: int) -> OnlyRecords:
    torch.manual_seed(0)
    num_rows = count * SHARD_ROWS
    rows = torch.arange(num_rows, dtype=torch.float32)[:, None] / num_rows
    executor = OnlyRecords()
    kdcache.build_cache(
        address, kdcache.TransferSet.from_arrays(rows, digest_inputs=False), {"teacher": nn.Linear(1, NUM_CLASSES)},
        shard_rows=SHARD_ROWS, chunk_rows=SHARD_ROWS, batch_size=SHARD_ROWS, num_pilot_rows=SHARD_ROWS,
        executor=executor,
    )  # fmt: skip
    return executor


def _seconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
