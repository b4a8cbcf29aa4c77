"""Record every teacher over both kinds of inputs, and print what was recorded: ``python -m benchmarks.teachers``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.teachers import NAMES, Recorded, load

_NUM_SHOWN_ROWS = 2000  # figures are taken over rows spread evenly


def main(names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None) -> None:
    """Record teachers that are not recorded yet, and print figures of all."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    columns = ("teacher", "inputs", "rows", "examples", "classes", "mean top probability", "median range", "max range")
    table = Table(*columns)
    for name in names or NAMES:
        for recorded in (load(name, kind="main"), load(name, kind="other")):
            table.add_row(*_figures(recorded))
    Console(width=120).print(table)


def _figures(recorded: Recorded) -> tuple[str, ...]:
    logits = recorded.logits(slice(0, None, max(1, recorded.num_rows // _NUM_SHOWN_ROWS)))
    ranges = logits.amax(1) - logits.amin(1)
    return (
        recorded.name,
        recorded.kind,
        f"{recorded.num_rows:,}",
        f"{len(recorded.example_index.unique()):,}",
        f"{recorded.num_classes:,}",
        f"{logits.softmax(1).amax(1).mean():.3f}",
        f"{ranges.median():.1f}",
        f"{ranges.max():.1f}",
    )


if __name__ == "__main__":
    typer.run(main)
