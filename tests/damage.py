"""Damage that a disk, a copy or a person does to a cache's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = [
    "zarr.json",
    "complete.json",
    "examples.parquet",
    "plans/0.json",
    "plans/1.json",
    "index/zarr.json",
    "index/entries/zarr.json",
    "index/entries/c/0/0",
    "index/fences/zarr.json",
    "index/fences/c/0/0",
    "teachers/zarr.json",
    "teachers/a/zarr.json",
    "teachers/a/codes/zarr.json",
    "teachers/a/codes/c/1/0",
    "teachers/b/codes/c/2/0",
    "teachers/a/PARAMETERS/zarr.json",
    "teachers/a/PARAMETERS/codebook/zarr.json",
    "teachers/a/PARAMETERS/codebook/c/0",
    "teachers/a/PARAMETERS/coefficients/c/0",
    "commits/a/0.json",
    "commits/b/2.json",
]
"""One of every kind, of a cache of codes to which a second teacher was added."""


def place(folder: Path, name: str) -> Path:
    parameters = next(path.name for path in (folder / "teachers/a").iterdir() if path.name.startswith("parameters-"))
    return folder / name.replace("PARAMETERS", parameters)


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def swap(folder: Path, one: str, other: str) -> None:
    data = (folder / one).read_bytes()
    (folder / one).write_bytes((folder / other).read_bytes())
    (folder / other).write_bytes(data)


def change(path: Path, **changes: Any) -> None:
    """Change a document, written as kdcache writes it."""
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}, indent=2, sort_keys=True) + "\n")
