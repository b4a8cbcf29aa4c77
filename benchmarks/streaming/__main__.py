"""Compare ways to stream soft targets: ``python -m benchmarks.streaming``, ``--quick`` for a look."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.streaming import report, shuffle, step
from benchmarks.streaming.lineup import CONTESTANTS
from benchmarks.streaming.reading import COLD, Effort, cold, read_row_set
from benchmarks.streaming.row_sets import ROW_SETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "streaming.json"
QUICK_RESULTS = ROOT / "benchmarks" / "out" / "streaming-quick.json"
PAGE = ROOT / "docs" / "streaming.md"
PARTS = ("read", "cold", "step", "shuffle")


def main(
    *,
    quick: Annotated[
        bool, typer.Option(help="A fifth of the rows, two short rounds; the page stays as it is.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="A part, a row set or a contestant; may be repeated.")] = None,
    page: Annotated[bool, typer.Option(help="Run nothing: write the page from the figures that are there.")] = False,
) -> None:
    """Run the parts, keep their figures, and write the page; what is left out keeps the figures that it had."""
    torch.set_num_threads(1)
    results = QUICK_RESULTS if quick else RESULTS
    document = json.loads(results.read_text()) if results.exists() else {}
    if not page:
        for name, figures in _run(frozenset(only or ()), quick=quick):
            document[name] = merged(document.get(name), figures)
            document["machine"] = _machine()
            results.parent.mkdir(exist_ok=True)
            results.write_text(json.dumps(document, indent=1) + "\n")
    tables = report.all_tables(document)
    if quick:
        for name, table in tables.items():
            typer.echo(f"\n{name}\n\n{table}")
        return
    report.draw(document, ROOT / "docs" / "images")
    PAGE.write_text(report.filled(PAGE.read_text(), tables))


def _run(only: frozenset[str], *, quick: bool) -> Any:
    unknown = only - {*PARTS, *ROW_SETS, *CONTESTANTS}
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)}: there are {', '.join((*PARTS, *ROW_SETS, *CONTESTANTS))}")
    effort = Effort.of(quick=quick)
    parts = [name for name in PARTS if name in only] or list(PARTS if not only else ("read", "cold"))
    row_sets = [name for name in ROW_SETS if name in only] or list(ROW_SETS)
    names = [name for name in CONTESTANTS if name in only] or list(CONTESTANTS)
    if "read" in parts:
        for row_set in row_sets:
            yield "read", [read_row_set(row_set, names, effort)]
    if "cold" in parts:
        for row_set in row_sets:
            yield "cold", [cold(row_set, [name for name in COLD if name in names], effort)]
    if "step" in parts:
        yield "step", step.run(quick=quick)
    if "shuffle" in parts:
        yield "shuffle", shuffle.run(quick=quick)


def merged(standing: Any, figures: Any) -> Any:
    """Put new figures in the place of the old ones of the same row set and contestant."""
    if not standing or not isinstance(figures, list) or "lines" not in figures[0]:
        return figures
    by_name = {one["name"]: one for one in standing}
    for one in figures:
        old = by_name.get(one["name"], {"lines": []})
        lines = {line["name"]: line for line in (*old["lines"], *one["lines"])}
        order = [name for name in CONTESTANTS if name in lines]
        by_name[one["name"]] = {**one, "lines": [lines[name] for name in order]}
    return [by_name[name] for name in ROW_SETS if name in by_name]


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "num_cores": os.cpu_count(),
    }


if __name__ == "__main__":
    typer.run(main)
