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
    quick: Annotated[bool, typer.Option(help="A quarter of the rows held out, no living teachers.")] = False,
    results: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS,
    tables: Annotated[bool, typer.Option(help="Run nothing: print the tables of a results file.")] = False,
) -> None:
    """Compare, write the figures, and print them as Markdown tables."""
    torch.set_num_threads(1)
    if not tables:
        run(teachers or TEACHERS, share=_QUICK_SHARE if quick else 1.0, live=not quick, results=results)
    console = Console(width=400, highlight=False, markup=False)
    for name, table in report.all_tables(json.loads(results.read_text())).items():
        console.print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
