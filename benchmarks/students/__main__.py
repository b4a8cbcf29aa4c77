"""Train students on soft targets kept in every way: ``python -m benchmarks.students``, ``--quick`` for a look."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from benchmarks.students.report import all_tables
from benchmarks.students.runner import GPU_RESULTS, OPENERS, PLANS, QUICK, RESULTS, run, run_transformer, write
from benchmarks.students.window_runner import WINDOW_PLANS
from kdcache.devices import choose_device

_OUT = Path(__file__).parents[1] / "out"


def main(
    *,
    quick: Annotated[bool, typer.Option(help="Few steps, rows and seeds; figures go to benchmarks/out.")] = False,
    only: Annotated[
        Literal["lm", "image", "transformer"] | None, typer.Option(help="One subject; others' figures stay.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="On cuda the transformer is trained, on cpu the small two.")
    ] = "auto",
    long: Annotated[
        bool, typer.Option(help="More rows, steps and seeds of the transformer: perhaps 15 minutes of an H100.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Begin no seed of the transformer that would end later.")] = math.inf,
    results: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    tables: Annotated[bool, typer.Option(help="Train nothing: redraw from the results file.")] = False,
) -> None:
    """Train, write the figures, and print them as Markdown tables."""
    chosen = choose_device(device)
    reads_windows = only == "transformer" or (only is None and chosen.type == "cuda")
    usual, quick_name = (GPU_RESULTS, "students-gpu-quick") if reads_windows else (RESULTS, "students-quick")
    target = results or (_OUT / f"{quick_name}.json" if quick else usual)
    if tables:
        write(json.loads(target.read_text()), target)
    elif reads_windows:
        plan = WINDOW_PLANS["quick" if quick else "long" if long else "full"]
        run_transformer(plan, chosen, results=target, minutes=minutes)
    else:
        torch.set_num_threads(1)
        run([only] if only else list(OPENERS), plans=QUICK if quick else PLANS, results=target)
    console = Console(width=400, highlight=False, markup=False)
    for name, table in all_tables(json.loads(target.read_text())["subjects"]).items():
        console.print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
