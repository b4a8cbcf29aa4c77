"""kdcache's tiers: the one module to change when there are others."""

from __future__ import annotations

__all__ = ["OURS", "TIERS", "Tier"]

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

import kdcache
from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from kdcache.stream import epoch_order

Tier = Callable[[kdcache.SoftTargetCache, int], Callable[[int], Iterator[tuple[Any, kdcache.SoftTargets]]]]
"""Gives the batches of an epoch of a cache, (numbers of rows, soft targets), at a batch size."""

_WINDOW_SHARDS: Final = 4


def _read_rows(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    # user's code
    def epoch(number: int) -> Iterator[tuple[Any, kdcache.SoftTargets]]:
        order = epoch_order(len(cache), seed=0, epoch=number)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows, cache.read_rows(rows)

    # end of it
    return epoch


def _scattered(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    # user's code
    # end of it
    return _read_rows(cache, batch_size)


def _held(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    # user's code
    cache.hold_in_memory()
    # end of it
    return _read_rows(cache, batch_size)


def _loader_in_memory(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    # user's code
    inputs = kdcache.TransferSet.from_arrays(torch.arange(len(cache)))
    loader = kdcache.SoftTargetLoader(cache, inputs, batch_size=batch_size, shuffle=True)

    def epoch(number: int) -> Iterator[tuple[Any, kdcache.SoftTargets]]:
        loader.set_epoch(number)
        for rows, _, soft_targets in loader:
            yield rows, soft_targets

    # end of it
    return epoch


def _loader_in_windows(cache: kdcache.SoftTargetCache, batch_size: int) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    # user's code
    inputs = kdcache.TransferSet.from_arrays(torch.arange(len(cache)))
    loader = kdcache.SoftTargetLoader(
        cache, inputs, batch_size=batch_size, shuffle="windowed", window_shards=_WINDOW_SHARDS, max_resident_bytes=0
    )

    def epoch(number: int) -> Iterator[tuple[Any, kdcache.SoftTargets]]:
        loader.set_epoch(number)
        for rows, _, soft_targets in loader:
            yield rows, soft_targets

    # end of it
    return epoch


TIERS: Final[dict[str, Tier]] = {
    "read_rows, in memory": _held,
    "read_rows, scattered": _scattered,
    "loader, in memory": _loader_in_memory,
    "loader, windows of 4 shards": _loader_in_windows,
}
"""Ways to stream a cache, by name."""


def _contestant(name: str, tier: Tier) -> Contestant:
    def open_epochs(stored: Stored) -> Epoch:
        # user's code
        cache = kdcache.open_cache(stored.folder)
        epochs = tier(cache, stored.batch_size)
        # end of it
        return lambda number: _codes(epochs(number))

    shared = (tier, _read_rows) if name.startswith("read_rows") else (tier,)
    return Contestant(f"kdcache, {name}", "kdcache", open_epochs, "cache", ("kdcache",), reads="codes", shared=shared)


def _codes(batches: Iterator[tuple[Any, kdcache.SoftTargets]]) -> Iterator[Batch]:
    for rows, soft_targets in batches:
        yield rows, soft_targets.codes


OURS: Final = tuple(_contestant(name, tier) for name, tier in TIERS.items())
"""kdcache's contestants."""
