"""Tiers: where a loader takes coded rows from, and what each holds in memory.

``device``
    All coded rows on the device of the training.
``memory``
    All coded rows in this process's memory; each chunk is decoded once, when it is first needed or before.
``mapped``
    An uncompressed copy in a local folder, mapped: its pages are the system's to keep or to drop.
``windows``
    Compressed shards, of which a few windows are held decoded; needs a windowed shuffle.
``scattered``
    Compressed shards, of which every batch reads the chunks that it needs; the chunks last used are kept.
"""

from __future__ import annotations

__all__ = ["TIERS", "RowReading", "RowSource", "Tier", "choose_tier", "open_tier"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import SoftTargetCache
from kdcache.errors import OptionError
from kdcache.row_selection import select_rows
from kdcache.soft_targets import SoftTargets
from kdcache.store import CodesReader, LocalCopy
from kdcache.store.reader import DEFAULT_CACHE_BYTES
from kdcache.stream.batches import Wanted
from kdcache.stream.epochs import Epochs
from kdcache.stream.order import Order
from kdcache.stream.windows import WindowedRows

Tier = Literal["device", "memory", "mapped", "windows", "scattered"]
TIERS: tuple[Tier, ...] = get_args(Tier)

_OF_FREE_DEVICE_MEMORY = 4
"""A device holds the rows by itself where they take no more than this part of what is free on it."""


class RowReading(Protocol):
    """An epoch's rows, read forwards by one thread."""

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:
        """Read rows by number, int64 [row], of examples at neighbouring wanted positions of the epoch [example]."""
        ...

    def close(self) -> None:
        """Give back what only this epoch needs."""
        ...


class RowSource(Protocol):
    """Where rows are taken from."""

    @property
    def tier(self) -> str:
        """One of `TIERS`."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of coded rows that are held at most, in the memory of the process or of the device."""
        ...

    def reading(self, order: Order, wanted: Wanted) -> RowReading:
        """Begin an epoch, of which only the wanted positions will be read."""
        ...


def choose_tier(
    cache: SoftTargetCache,
    *,
    teachers: Sequence[str] | None,
    device: torch.device | None,
    max_resident_bytes: int,
    local_copy: str | Path | None,
) -> Tier:
    """Choose the quickest tier that what is there allows; see the module for what each is."""
    if cache.complete is None:
        return "scattered"
    if local_copy is not None:
        return "mapped"
    num_bytes = cache.coded_bytes(teachers=teachers)
    if num_bytes <= max_resident_bytes:
        return "device" if _has_room(device, num_bytes) else "memory"
    return "windows"


def open_tier(
    tier: Tier,
    cache: SoftTargetCache,
    epochs: Epochs,
    *,
    teachers: Sequence[str] | None,
    device: torch.device | None,
    local_copy: str | Path | None,
) -> RowSource:
    """Make ready to read from a tier.

    Raises
    ------
    CorruptCacheError
        A shard is missing, torn or altered.
    IncompleteCacheError
        The build has not finished, and the tier is another than "scattered".
    OptionError
        The tier needs an option that is not given.
    """
    if tier == "windows":
        if epochs.windows is None:
            raise OptionError("tier='windows' reads a cache window by window; give shuffle='windowed' with it")
        cache.require_complete("read in windows")
        return WindowedRows(cache, epochs, epochs.windows, teachers)
    if tier == "mapped":
        if local_copy is None:
            raise OptionError("tier='mapped' needs local_copy=, the folder for an uncompressed copy of the rows")
        return _Mapped.of(cache, teachers, local_copy)
    if tier == "memory":
        return _Resident(cache, teachers)
    return _OnDevice.of(cache, teachers, device) if tier == "device" else _Scattered(cache, teachers)


class _Anywhere:
    """Reads in any order, so that an epoch needs nothing of its own."""

    def reading(self, order: Order, wanted: Wanted) -> Any:  # noqa: ARG002 - any order will do
        return self

    def close(self) -> None:
        """Leave all as it is, for the next epoch."""


@dataclass(frozen=True, eq=False)
class _Resident(_Anywhere):
    cache: SoftTargetCache
    teachers: Sequence[str] | None

    tier = "memory"

    @property
    def held_bytes(self) -> int:
        return self.cache.coded_bytes(teachers=self.teachers)

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:  # noqa: ARG002
        held = self.cache.resident_codes(teachers=self.teachers)
        for resident in held:
            resident.fill(rows)
        return _gathered(self.cache, self.teachers, [torch.from_numpy(resident.codes) for resident in held], rows)


@dataclass(frozen=True, eq=False)
class _OnDevice(_Anywhere):
    cache: SoftTargetCache
    teachers: Sequence[str] | None
    held: tuple[Tensor, ...]

    tier = "device"

    @classmethod
    def of(cls, cache: SoftTargetCache, teachers: Sequence[str] | None, device: torch.device | None) -> _OnDevice:
        if device is None:
            raise OptionError("tier='device' holds the rows on the device of the training; give device= with it")
        cache.require_complete("held on a device")
        held = tuple(
            _on_device(reader, cache.document.num_shards, device) for reader in cache.codes_readers(teachers=teachers)
        )
        return cls(cache, teachers, held)

    @property
    def held_bytes(self) -> int:
        return sum(codes.nbytes for codes in self.held)

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:  # noqa: ARG002
        return _gathered(self.cache, self.teachers, self.held, rows)


@dataclass(frozen=True, eq=False)
class _Mapped(_Anywhere):
    cache: SoftTargetCache
    teachers: Sequence[str] | None
    copies: tuple[LocalCopy, ...]

    tier = "mapped"
    held_bytes = 0

    @classmethod
    def of(cls, cache: SoftTargetCache, teachers: Sequence[str] | None, folder: str | Path) -> _Mapped:
        return cls(cache, teachers, cache.copy_to(folder, teachers=teachers))

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:  # noqa: ARG002
        for copy in self.copies:
            copy.check(rows)
        return _gathered(self.cache, self.teachers, [torch.from_numpy(copy.codes) for copy in self.copies], rows)


@dataclass(frozen=True, eq=False)
class _Scattered(_Anywhere):
    cache: SoftTargetCache
    teachers: Sequence[str] | None

    tier = "scattered"

    @property
    def held_bytes(self) -> int:
        return DEFAULT_CACHE_BYTES * len(self.cache.codes_readers(teachers=self.teachers))

    def read(self, rows: np.ndarray, positions: np.ndarray) -> SoftTargets:  # noqa: ARG002
        return self.cache.read_rows(rows, teachers=self.teachers)


def _gathered(
    cache: SoftTargetCache, teachers: Sequence[str] | None, held: Sequence[Tensor], rows: np.ndarray
) -> SoftTargets:
    """Gather rows out of codes that are held whole, [row, column] one a teacher, where they are held."""
    index = torch.from_numpy(rows).to(held[0].device)
    return cache.wrap([select_rows(codes, index) for codes in held], teachers=teachers)


def _on_device(reader: CodesReader, num_shards: int, device: torch.device) -> Tensor:
    """Put all rows onto a device, shard by shard, so that this process never holds them all."""
    spec = reader.spec
    empty = torch.from_numpy(np.empty((0, spec.num_columns), spec.little))
    codes = torch.empty((num_shards * spec.shard_rows, spec.num_columns), dtype=empty.dtype, device=device)
    for shard_index in range(num_shards):
        rows = torch.from_numpy(reader.read_shard(shard_index))
        codes[shard_index * spec.shard_rows :][: len(rows)] = rows.to(device)
    return codes


def _has_room(device: torch.device | None, num_bytes: int) -> bool:
    if device is None or device.type != "cuda":
        return False
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= free_bytes // _OF_FREE_DEVICE_MEMORY
