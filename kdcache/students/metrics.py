"""Metrics: one JSON line an epoch and student, kept in step with the checkpoint.

A *line* is a flat mapping. Lines are written before the checkpoint of their epoch; lines of epochs that no checkpoint
covers are dropped when a run is resumed, so that no epoch stands twice.
"""

from __future__ import annotations

__all__ = ["MetricsFile", "read_metrics"]

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import JobError
from kdcache.store import LocalObjects

Line = dict[str, Any]


class MetricsFile:
    """A file of JSON lines that is appended to durably.

    Parameters
    ----------
    path : Path
        Made, with its folder, when first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines; on disk when this returns. A number that is not finite is written as null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(_finite(line), allow_nan=False) + "\n" for line in lines)
        with self.path.open("ab") as opened:
            opened.write(text.encode())
            opened.flush()
            os.fsync(opened.fileno())

    def lines(self) -> list[Line]:
        """Read all whole lines."""
        return _whole_lines(self.path) if self.path.exists() else []

    def keep_epochs(self, num_epochs: int) -> None:
        """Drop the lines of epochs after the first `num_epochs`, and a last line that was cut short."""
        if not self.path.exists():
            return
        kept = [line for line in self.lines() if line["epoch"] <= num_epochs]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        LocalObjects(self.path.parent).replace(self.path.name, text.encode())


def read_metrics(path: str | Path) -> list[Line]:
    """Read a metrics file, or all those below a run's folder.

    Parameters
    ----------
    path : str or Path
        A ``metrics.jsonl``, or a folder with such files in it or below it.

    Returns
    -------
    list of dict
        The lines, file by file in the order of their paths.

    Raises
    ------
    JobError
        There is no such file.
    """
    path = Path(path)
    files = sorted(path.rglob("metrics.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise JobError(f"there are no metrics at {path}; `kdcache train` writes them below its output folder")
    return [line for file in files for line in _whole_lines(file)]


def _whole_lines(path: Path) -> list[Line]:
    *whole, _ = path.read_bytes().split(b"\n")  # what follows the last newline is empty, or was cut short by a crash
    return [json.loads(line) for line in whole]


def _finite(line: Mapping[str, Any]) -> Line:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
