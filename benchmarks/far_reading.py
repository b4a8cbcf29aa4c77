"""Reading from far away, a store that holds every request up: ``python -m benchmarks.far_reading``.

The store is nanio on this machine, behind the proxy of the tests, which waits before it passes a request on. The table
goes into docs/howto/object-stores.md.
"""

from __future__ import annotations

__all__ = ["main"]

import importlib
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import kdcache
from benchmarks.streaming.row_sets import TEACHER, lookup_teacher, mixed_logits

_ROOT: Final = Path(__file__).parents[1]
_PAGE: Final = _ROOT / "docs" / "howto" / "object-stores.md"
_MARKS: Final = ("<!-- table of far reading -->", "<!-- end -->")
NUM_SHARDS: Final = 16
BATCH_SIZE: Final = 256
DELAY_SECONDS: Final = 0.02
ROUNDS: Final = 5
_CACHES: Final = {"small": (256, 128), "large": (1024, 1000)}
"""Rows of a shard and classes: shards below and above a mebibyte."""
_TIERS: Final = ("scattered", "windows", "memory")


@dataclass(frozen=True)
class Cost:
    """What one round took."""

    num_requests: int
    seconds: float


@dataclass(frozen=True)
class Store:
    """A cache in the store, and the proxy before it."""

    address: str
    faults: Any
    num_rows: int
    shard_rows: int
    folder: Path

    def cost(self, read: Callable[[], object]) -> Cost:
        """Do something once, and count what it asks for."""
        before, began = len(self.faults.seen), time.perf_counter()
        read()
        return Cost(len(self.faults.seen) - before, time.perf_counter() - began)


def _opening(store: Store) -> dict[str, Cost]:
    return {"opening": store.cost(lambda: kdcache.open_cache(store.address))}


def _rows(store: Store) -> dict[str, Cost]:
    cache = kdcache.open_cache(store.address)
    cache.codes_readers()
    one_each = np.arange(1, NUM_SHARDS) * store.shard_rows
    return {
        "first rows of a shard": store.cost(lambda: cache.read_rows(np.arange(4))),
        "further rows of it": store.cost(lambda: cache.read_rows(np.array([store.shard_rows - 1]))),
        "a row of each of 15 new shards": store.cost(lambda: cache.read_rows(one_each)),
    }


def _epoch(store: Store) -> dict[str, Cost]:
    found = {}
    for tier in _TIERS:
        batches: Iterator[Any] = iter(())
        cache = kdcache.open_cache(store.address)

        def first(tier: Any = tier, cache: Any = cache) -> None:
            nonlocal batches
            batches = iter(kdcache.SoftTargetLoader(cache, batch_size=BATCH_SIZE, tier=tier))
            next(batches)

        begun = store.cost(first)
        rest = store.cost(lambda: [None for _ in batches])  # noqa: B023 - called at once
        found[f"first batch, tier {tier}"] = begun
        found[f"epoch, tier {tier}"] = Cost(
            begun.num_requests + rest.num_requests, begun.seconds + rest.seconds
        )  # fmt: skip
    return found


def _kept(store: Store) -> dict[str, Cost]:
    pages = store.folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    rows = np.arange(store.num_rows)
    read = lambda: kdcache.open_cache(store.address, local_cache=pages).read_rows(rows)  # noqa: E731
    return {"all rows, into a local_cache": store.cost(read), "all rows again, from it": store.cost(read)}


def _medians(store: Store) -> dict[str, Cost]:
    rounds: dict[str, list[Cost]] = {}
    for number in range(ROUNDS + 1):
        for part in (_opening, _rows, _epoch, _kept):
            for name, cost in part(store).items():
                rounds.setdefault(name, []).extend([cost] if number else [])  # the first does not count
    return {
        name: Cost(
            int(statistics.median(cost.num_requests for cost in costs)),
            statistics.median(cost.seconds for cost in costs),
        )
        for name, costs in rounds.items()
    }


@contextmanager
def _stores() -> Iterator[Mapping[str, Store]]:
    """Build the caches straight into the server, and read them through the proxy."""
    sys.path.insert(0, str(_ROOT / "tests"))
    proxy_before = importlib.import_module("faulty_proxy").proxy_before
    running = importlib.import_module("object_servers").running
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdcache-bench-")))
        server = stack.enter_context(running("nanio", folder / "server"))
        os.environ |= {**server.environment(), "AWS_ALLOW_HTTP": "true"}
        addresses = {name: server.new_address() for name in _CACHES}
        for name, address in addresses.items():
            _build(address, *_CACHES[name])
        endpoint, faults = stack.enter_context(proxy_before(server.endpoint))
        os.environ |= server.environment(endpoint)
        faults.delay_seconds = DELAY_SECONDS
        yield {
            name: Store(address, faults, NUM_SHARDS * _CACHES[name][0], _CACHES[name][0], folder)
            for name, address in addresses.items()
        }


def _build(address: str, shard_rows: int, num_classes: int) -> None:
    logits = mixed_logits(NUM_SHARDS * shard_rows)[:, :num_classes].float()
    transfer_set = kdcache.TransferSet.from_arrays(torch.arange(len(logits)))
    teachers = {TEACHER: lookup_teacher(logits)}
    codec = kdcache.Lossless(dtype="float16")
    kdcache.build_cache(address, transfer_set, teachers, codec=codec, shard_rows=shard_rows, batch_size=1024)


def _table(found: Mapping[str, Mapping[str, Cost]], shard_bytes: Mapping[str, float]) -> str:
    heads = [f"shards of {_size(shard_bytes[name])}: {what}" for name in found for what in ("requests", "seconds")]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row in next(iter(found.values())):
        costs = [costs[row] for costs in found.values()]
        lines.append(f"| {row} | {' | '.join(f'{cost.num_requests} | {cost.seconds:.3f}' for cost in costs)} |")
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**10:.0f} KiB" if num_bytes < 2**20 else f"{num_bytes / 2**20:.1f} MiB"


def main() -> None:
    """Measure, print the table, and write it into the page."""
    torch.set_num_threads(1)
    with _stores() as stores:
        shard_bytes = {
            name: kdcache.open_cache(store.address).sizes().code_bytes / NUM_SHARDS for name, store in stores.items()
        }
        table = _table({name: _medians(store) for name, store in stores.items()}, shard_bytes)
    print(table)  # noqa: T201
    start, end = (re.escape(mark) for mark in _MARKS)
    page, count = re.subn(f"(?<={start}\n)(?s:.*?)(?={end})", lambda _: f"{table}\n", _PAGE.read_text())
    if count != 1:
        raise SystemExit(f"{_PAGE} has no place for the table")
    _PAGE.write_text(page)


if __name__ == "__main__":
    main()
