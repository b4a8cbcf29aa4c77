"""Measure, keep the figures, and write the tables of docs/scale.md: ``python -m benchmarks.scale``."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.scale import clusters, index, paper, records

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "records": records.run,
    "index": index.run,
    "clusters": clusters.run,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Parts to measure; all by default.")] = None,
    *,
    page: Annotated[
        bool, typer.Option(help="Measure nothing: write the page from the figures that are there.")
    ] = False,
) -> None:
    """Measure some parts; the others keep the figures that they had."""
    unknown = set(names or ()) - PARTS.keys()
    if unknown:
        raise typer.BadParameter(f"there is no part {sorted(unknown)}; there are {sorted(PARTS)}")
    torch.set_num_threads(1)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in () if page else names or PARTS:
        document[name] = PARTS[name]()
        document["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        document["load"] = {**document.get("load", {}), name: os.getloadavg()[1]}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    if "records" in document:
        document["paper"] = paper.on_paper(document["records"])
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    text = PAGE.read_text()
    for name in document.keys() & {*PARTS, "paper"}:
        text = filled(text, name, table(document[name]))
    PAGE.write_text(text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as a Markdown table."""
    lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0])]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, name: str, text: str) -> str:
    """Put a table between a page's marks of that name."""
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return mark.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
