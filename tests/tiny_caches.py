"""Tiny transfer sets, teachers and caches: forty examples, five classes, three shards a teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdcache
from kdcache import Lossless, SoftTargetCache, TransferSet
from kdcache.store import LocalObjects

NUM_EXAMPLES = 40
NUM_CLASSES = 5
OPTIONS: dict[str, Any] = {"codec": Lossless(), "shard_rows": 16, "chunk_rows": 8, "batch_size": 12}


def tiny_inputs(num_examples: int = NUM_EXAMPLES, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_examples, 4, generator=torch.Generator().manual_seed(seed))


def tiny_labels(num_examples: int = NUM_EXAMPLES) -> list[int]:
    return [index % NUM_CLASSES for index in range(num_examples)]


def tiny_transfer_set(num_examples: int = NUM_EXAMPLES, **options: Any) -> TransferSet:
    options = {"labels": tiny_labels(num_examples), **options}
    return TransferSet.from_arrays(tiny_inputs(num_examples), **options)


class TinyTeacher(nn.Linear):
    """A linear teacher that counts the batches it is given."""

    def __init__(self, seed: int = 0, num_classes: int = NUM_CLASSES) -> None:
        torch.manual_seed(seed)
        super().__init__(4, num_classes)
        nn.init.normal_(self.weight, std=2)
        self.num_calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return super().forward(inputs)


def tiny_teachers(count: int = 2) -> dict[str, nn.Module]:
    return {name: TinyTeacher(seed) for seed, name in enumerate("abcdef"[:count])}


def build_tiny(
    folder: Path, transfer_set: TransferSet | None = None, teachers: Any = None, **options: Any
) -> SoftTargetCache:
    transfer_set = tiny_transfer_set() if transfer_set is None else transfer_set
    teachers = tiny_teachers() if teachers is None else teachers
    return kdcache.build_cache(folder, transfer_set, teachers, **{**OPTIONS, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stop(Exception):  # noqa: N818 - it stands for a kill, not for an error
    """Stands for the end of the process."""


class StoppingObjects(LocalObjects):
    """Local objects that stop before their write number `at`, and write nothing from then on."""

    def __init__(self, root: Any, writes: Iterator[int], at: int | None) -> None:
        super().__init__(root)
        self._writes = writes
        self._at = at

    def publish(self, key: str, data: bytes) -> bool:
        self._count()
        return super().publish(key, data)

    def replace(self, key: str, data: bytes) -> None:
        self._count()
        super().replace(key, data)

    def _count(self) -> None:
        number = next(self._writes)
        if self._at is not None and number >= self._at:
            raise Stop


class OneAtATime:
    """A dataset that two threads may not read at a time, and that takes its time."""

    def __init__(self) -> None:
        self.inputs, self.num_reading, self.most_reading = tiny_inputs(), 0, 0

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        self.num_reading += 1
        self.most_reading = max(self.most_reading, self.num_reading)
        time.sleep(0.005)
        self.num_reading -= 1
        return self.inputs[index]
