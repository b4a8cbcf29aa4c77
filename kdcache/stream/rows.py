"""Where coded rows are read from while a student trains: one of several tiers behind one small interface."""

from __future__ import annotations

__all__ = ["RowSource", "Tier", "open_rows"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdcache.cache import SoftTargetCache
from kdcache.soft_targets import SoftTargets

Tier = Literal["memory", "shards"]
"""Name of a tier."""


class RowSource(Protocol):
    """Coded rows of a cache, by row number."""

    @property
    def tier(self) -> Tier:
        """Which tier it is."""
        ...

    def read(self, rows: np.ndarray) -> SoftTargets:
        """Read rows by number, in the order given, still coded."""
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """Say which shards' rows are read from now on, the soonest first; others may be forgotten."""
        ...


def open_rows(cache: SoftTargetCache, *, teachers: Sequence[str] | None, max_resident_bytes: int) -> RowSource:
    """Choose a tier for a cache."""
    if cache.coded_bytes(teachers=teachers) <= max_resident_bytes and cache.complete is not None:
        cache.hold_in_memory(teachers=teachers)
        return _CacheRows(cache, teachers, "memory")
    return _CacheRows(cache, teachers, "shards")


@dataclass(frozen=True, eq=False)
class _CacheRows:
    cache: SoftTargetCache
    teachers: Sequence[str] | None
    tier: Tier

    def read(self, rows: np.ndarray) -> SoftTargets:
        return self.cache.read_rows(rows, teachers=self.teachers)

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing is prepared: chunks are read where they lie."""
