"""Train students on soft targets kept in every way: ``python -m benchmarks.students``, ``--quick`` for a look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from benchmarks.students.report import all_tables
from benchmarks.students.runner import OPENERS, PLANS, QUICK, RESULTS, run, write

_QUICK_RESULTS = Path(__file__).parents[1] / "out" / "students-quick.json"


def main(
    *,
    quick: Annotated[bool, typer.Option(help="Few steps, rows and seeds; figures go to benchmarks/out.")] = False,
    only: Annotated[Literal["lm", "image"] | None, typer.Option(help="One subject; the other's figures stay.")] = None,
    results: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    tables: Annotated[bool, typer.Option(help="Train nothing: redraw from the results file.")] = False,
) -> None:
    """Train, write the figures, and print them as Markdown tables."""
    torch.set_num_threads(1)
    target = results or (_QUICK_RESULTS if quick else RESULTS)
    if tables:
        write(json.loads(target.read_text()), target)
    else:
        run([only] if only else list(OPENERS), plans=QUICK if quick else PLANS, results=target)
    console = Console(width=400, highlight=False, markup=False)
    for name, table in all_tables(json.loads(target.read_text())["subjects"]).items():
        console.print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
