"""Run benchmarks by name, print their tables, and keep their figures as JSON in benchmarks/out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import (
    build_overhead,
    bytes_below,
    encode,
    fidelity,
    import_time,
    loss,
    on_accelerator,
    open_cache,
    precision,
    rate_control,
    scale,
    targets,
)
from benchmarks.streaming import step

BENCHMARKS = {
    "import": import_time.run,
    "open": open_cache.run,
    "build": build_overhead.run,
    "step": step.run,
    "loss": loss.run,
    "encode": encode.run,
    "guard": rate_control.run_guard,
    "ranks": rate_control.run_ranks,
    "samples": rate_control.run_samples,
    "fidelity": fidelity.run,
    "scale": scale.run,
    "precision": precision.run,
    "targets": targets.run,
    "below": bytes_below.run,
}
ON_ACCELERATOR = {"accelerator-step": on_accelerator.run_step, "accelerator-loss": on_accelerator.run_large_loss}
"""Run by name, or by default where there is CUDA."""
OUT = Path(__file__).parent / "out"


def main(names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None) -> None:
    """Run benchmarks."""
    known = {**BENCHMARKS, **ON_ACCELERATOR}
    unknown = set(names or ()) - known.keys()
    if unknown:
        raise typer.BadParameter(f"there is no benchmark {sorted(unknown)}; there are {sorted(known)}")
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    for name in names or (known if torch.cuda.is_available() else BENCHMARKS):
        rows = known[name]()
        (OUT / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
        _print(name, rows)


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*(column.replace("_", " ") for column in rows[0]), title=name)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=160).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(_cell(item) for item in value)
    return str(value)


if __name__ == "__main__":
    typer.run(main)
