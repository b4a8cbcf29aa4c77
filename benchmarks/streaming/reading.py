"""Part A and C: contestants read a row set, shuffled, in turns; then each again from a cold start."""

from __future__ import annotations

__all__ = ["COLD", "Effort", "cold", "read_row_set"]

import contextlib
import importlib.metadata
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console

from benchmarks.streaming.contestant import Contestant, user_lines
from benchmarks.streaming.lineup import CONTESTANTS
from benchmarks.streaming.process import ContestantError, ContestantProcess
from benchmarks.streaming.resources import bytes_on_disk, drop_pages
from benchmarks.streaming.row_sets import RowSet, open_row_set

COLD: Final = (
    "kdcache, loader, windows",
    "kdcache, loader, memory",
    "zarrs, windows of 4 shards",
    "Parquet, fixed-size binary",
    "memmap[rows], uncompressed",
)
"""Who reads from a cold start."""

_CONSOLE: Final = Console(stderr=True, highlight=False, markup=False)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Parameters
    ----------
    quick : bool
        A fifth of the rows.
    rounds : int
        That count; one more comes before.
    min_seconds, max_seconds : float
        Epochs are repeated until they have lasted so long, and broken off after so long.
    """

    quick: bool
    rounds: int
    fresh_runs: int
    min_seconds: float
    max_seconds: float

    @classmethod
    def of(cls, *, quick: bool) -> Effort:
        """Give two short rounds, or five."""
        return cls(quick, 2, 1, 0.2, 1.0) if quick else cls(quick, 5, 3, 0.5, 2.0)


def read_row_set(name: str, names: Sequence[str], effort: Effort) -> dict[str, Any]:
    """Check and time contestants on a row set, and give a line of figures for each."""
    row_set = open_row_set(name, quick=effort.quick)
    lines = {one: _line(CONTESTANTS[one]) for one in names}
    with contextlib.ExitStack() as stack:
        running: dict[str, ContestantProcess] = {}
        for one in names:
            with _errors_told(lines[one]):
                _CONSOLE.print(f"{name}: {one}")
                _write(row_set, one, effort, lines[one])
                with contextlib.ExitStack() as others:
                    processes = [
                        others.enter_context(_process(name, one, effort)) for _ in range(effort.fresh_runs - 1)
                    ]
                    process = stack.enter_context(_process(name, one, effort))
                    _measure_fresh([*processes, process], effort, lines[one])
                process.ask("check")
                running[one] = process
        for number in range(effort.rounds + 1):
            for one, process in running.items():
                if lines[one]["error"] is None:
                    with _errors_told(lines[one]):
                        answer = process.ask(
                            "epoch", number=number, min_seconds=effort.min_seconds, max_seconds=effort.max_seconds
                        )
                        if number:
                            _add_round(lines[one], answer)
    return {
        "name": name, "title": row_set.title, "num_rows": row_set.num_rows,
        "row_bytes": row_set.codes.dtype.itemsize * row_set.codes.shape[1], "lines": list(lines.values()),
    }  # fmt: skip


def cold(name: str, names: Sequence[str], effort: Effort) -> dict[str, Any]:
    """Time opening and the first epoch in fresh processes, with the pages of all files dropped before."""
    row_set = open_row_set(name, quick=effort.quick)
    lines: dict[str, dict[str, Any]] = {one: {"name": one, "rows_per_second": [], "error": None} for one in names}
    for _ in range(effort.rounds):
        for one in names:
            with _errors_told(lines[one]), _process(name, one, effort) as process:
                process.ask("write")
                drop_pages(row_set.stored(CONTESTANTS[one].stored_as))
                answer = process.ask("fresh", max_seconds=60.0)
                lines[one]["rows_per_second"].append(answer["rows"] / answer["seconds"])
    return {"name": name, "title": row_set.title, "lines": list(lines.values())}


def _line(contestant: Contestant) -> dict[str, Any]:
    return {
        "name": contestant.name, "kind": contestant.kind, "note": contestant.note, "reads": contestant.reads,
        "user_lines": user_lines(contestant), "version": _version(contestant.modules[0]), "error": None,
        "rows_per_second": [], "rows_per_cpu_second": [], "first_batch_seconds": None, "memory_bytes": None,
        "disk_bytes": None,
    }  # fmt: skip


def _write(row_set: RowSet, name: str, effort: Effort, line: dict[str, Any]) -> None:
    folder = row_set.stored(CONTESTANTS[name].stored_as)
    if not folder.is_dir():
        with _process(row_set.name, name, effort) as process:
            process.ask("write")
    line["disk_bytes"] = bytes_on_disk(folder)


def _measure_fresh(processes: Sequence[ContestantProcess], effort: Effort, line: dict[str, Any]) -> None:
    """Measure the first batch and the memory in processes that have done nothing else."""
    answers = [process.ask("fresh", max_seconds=effort.max_seconds) for process in processes]
    line["first_batch_seconds"] = statistics.median(answer["first_batch_seconds"] for answer in answers)
    line["memory_bytes"] = statistics.median(answer["bytes"] for answer in answers)


def _add_round(line: dict[str, Any], answer: dict[str, Any]) -> None:
    line["rows_per_second"].append(answer["rows"] / answer["seconds"])
    line["rows_per_cpu_second"].append(answer["rows"] / answer["cpu_seconds"])


def _process(row_set: str, contestant: str, effort: Effort) -> ContestantProcess:
    return ContestantProcess(row_set, contestant, quick=effort.quick)


@contextlib.contextmanager
def _errors_told(line: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except ContestantError as error:
        line["error"] = str(error)
        _CONSOLE.print(f"  {error}")


def _version(module: str) -> str:
    name = module.partition(".")[0]
    name = {"lance": "pylance", "benchmarks": "mosaicml-streaming"}.get(name, name)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
