"""Compare what formats keep of real teachers: ``python -m benchmarks.fidelity``, ``--quick`` for a look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.fidelity import report
from benchmarks.fidelity.runner import RESULTS, TEACHERS, run

_QUICK_SHARE = 0.25


def main(
    teachers: Annotated[list[str] | None, typer.Argument(help="Which teachers; all by default.")] = None,
    *,
    quick: Annotated[bool, typer.Option(help="A quarter of the rows, no living teachers.")] = False,
    results: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS,
    tables: Annotated[bool, typer.Option(help="Run nothing: print the tables of a results file.")] = False,
) -> None:
    """Compare, write the figures, and print them as Markdown tables."""
    torch.set_num_threads(1)
    if not tables:
        run(teachers or TEACHERS, share=_QUICK_SHARE if quick else 1.0, live=not quick, results=results)
    document = json.loads(results.read_text())
    console = Console(width=400, highlight=False, markup=False)
    for teacher in dict.fromkeys(line["teacher"] for line in document["lines"]):
        for table in (report.fidelity_table, report.l1_table):
            console.print(f"\n{teacher}\n\n{table(document['lines'], teacher)}")
    console.print(f"\ncosts\n\n{report.rates_table(document['lines'], document['forward_seconds'])}")
    console.print(f"\nensemble\n\n{report.ensemble_table(document['ensemble'])}")


if __name__ == "__main__":
    typer.run(main)
