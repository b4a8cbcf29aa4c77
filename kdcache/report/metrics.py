"""Metrics on disk: JSON lines, one an epoch and student."""

from __future__ import annotations

__all__ = ["Line", "read_metrics", "whole_lines"]

import json
from pathlib import Path
from typing import Any

from kdcache.errors import JobError

Line = dict[str, Any]
"""One epoch of one student: its sweep, temperature, soft weight and seed, and what was measured."""


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
    return [line for file in files for line in whole_lines(file)]


def whole_lines(path: Path) -> list[Line]:
    """Read the lines of a file, without a last one that a crash cut short."""
    *whole, _ = path.read_bytes().split(b"\n")  # what follows the last newline is empty, or was cut short
    return [json.loads(line) for line in whole]
