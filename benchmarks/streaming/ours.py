"""kdcache's tiers: the one module to change when there are others."""

from __future__ import annotations

__all__ = ["OURS", "TIERS", "Tier"]

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

import kdcache
from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from kdcache.stream import epoch_order

Tier = Callable[[kdcache.SoftTargetCache, int], Callable[[int], Iterator[tuple[Any, kdcache.SoftTargets]]]]
"""Gives the batches of an epoch of a cache, (numbers of rows, soft targets), at a batch size."""


def _read_rows(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    # user's code
    cache.hold_in_memory()

    def epoch(number: int) -> Iterator[tuple[Any, kdcache.SoftTargets]]:
        order = epoch_order(len(cache), seed=0, epoch=number)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows, cache.read_rows(rows)

    # end of it
    return epoch


def _loader(tier: Any) -> Tier:
    def open_loader(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
        copies = Path(f"{cache.address}-copies")
        # user's code
        inputs = kdcache.TransferSet.from_arrays(torch.arange(len(cache)))
        options: dict[str, Any] = {"local_copy": copies} if tier == "mapped" else {}
        loader = kdcache.SoftTargetLoader(cache, inputs, batch_size=batch_size, tier=tier, **options)

        def epoch(number: int) -> Iterator[tuple[Any, kdcache.SoftTargets]]:
            loader.set_epoch(number)
            for rows, _, soft_targets in loader:
                yield rows, soft_targets

        # end of it
        return epoch

    return open_loader


TIERS: Final[dict[str, Tier]] = {
    "read_rows, in memory": _read_rows,
    "loader, memory": _loader("memory"),
    "loader, mapped": _loader("mapped"),
    "loader, windows": _loader("windows"),
    "loader, scattered": _loader("scattered"),
}
"""Ways to stream a cache, by name."""


def _contestant(name: str, tier: Tier) -> Contestant:
    def open_epochs(stored: Stored) -> Epoch:
        # user's code
        cache = kdcache.open_cache(stored.folder)
        epochs = tier(cache, stored.batch_size)
        # end of it
        return lambda number: _codes(epochs(number))

    return Contestant(f"kdcache, {name}", "kdcache", open_epochs, "cache", ("kdcache",), reads="codes", shared=(tier,))


def _codes(batches: Iterator[tuple[Any, kdcache.SoftTargets]]) -> Iterator[Batch]:
    for rows, soft_targets in batches:
        yield rows, soft_targets.codes


OURS: Final = tuple(_contestant(name, tier) for name, tier in TIERS.items())
"""kdcache's contestants."""
