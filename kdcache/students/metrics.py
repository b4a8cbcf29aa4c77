"""Metrics: one JSON line an epoch and student, kept in step with the checkpoint.

A *line* is a flat mapping. Lines are written before the checkpoint of their epoch; lines of epochs that no checkpoint
covers are dropped when a run is resumed, so that no epoch stands twice.
"""

from __future__ import annotations

__all__ = ["MetricsFile"]

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.report.metrics import Line, whole_lines
from kdcache.store import LocalObjects


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
        return whole_lines(self.path) if self.path.exists() else []

    def keep_epochs(self, num_epochs: int) -> None:
        """Drop the lines of epochs after the first `num_epochs`, and a last line that was cut short."""
        if not self.path.exists():
            return
        kept = [line for line in self.lines() if line["epoch"] <= num_epochs]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        LocalObjects(self.path.parent).replace(self.path.name, text.encode())


def _finite(line: Mapping[str, Any]) -> Line:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
