"""The whole comparison, from teachers to figures on disk."""

from __future__ import annotations

__all__ = ["RESULTS", "compare_teacher", "run", "write"]

import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.fidelity.ensemble import MEMBERS, compare_ensemble
from benchmarks.fidelity.lineup import our_entries, peer_entries
from benchmarks.fidelity.measures import compare
from benchmarks.fidelity.rates import rates
from benchmarks.fidelity.report import all_tables, draw, filled
from benchmarks.fidelity.subjects import forward_seconds, open_subject

TEACHERS: Final = ("smollm2", "efficientnet-lite0", "ppocr")
DOCS: Final = Path(__file__).parents[2] / "docs"
RESULTS: Final = DOCS / "results" / "fidelity.json"
PICTURE: Final = DOCS / "images" / "fidelity"
PAGE: Final = DOCS / "fidelity.md"


def run(
    teachers: Sequence[str] = TEACHERS, *, share: float = 1.0, live: bool = True, results: Path = RESULTS
) -> list[dict[str, Any]]:
    """Compare on every teacher, then the ensemble; after each, write the figures so far and draw them.

    Parameters
    ----------
    teachers : sequence of str
        Of `TEACHERS`.
    share : float, default 1
        Part of the rows held out to take, for a quick look.
    live : bool, default True
        Time the living teachers too.
    results : Path
        The JSON file; the picture goes to docs/images where this is the usual file, else beside it.

    Returns
    -------
    list of dict
        The rows of the printed table: default settings, KL at some temperatures.
    """
    lines: list[dict[str, Any]] = []
    document: dict[str, Any] = {"made_on": _machine(), "forward_seconds": {}, "lines": lines, "ensemble": []}
    for teacher in teachers:
        with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
            lines += compare_teacher(teacher, Path(folder), share=share)
        if live:
            document["forward_seconds"][teacher] = forward_seconds(teacher)
        write(document, results)
    if MEMBERS[0] in teachers:
        with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
            document["ensemble"] = compare_ensemble(Path(folder), share=share)
        write(document, results)
    return [_row(line) for line in lines if line["is_default"]]


def compare_teacher(name: str, folder: Path, *, share: float = 1.0) -> list[dict[str, Any]]:
    """Compare on one teacher: a line for each contestant."""
    console = Console(stderr=True)
    subject = open_subject(name, share=share)
    ours = our_entries(subject, folder)
    budgets = sorted({round(entry.sizes.row_bytes) for entry in ours if "samples" not in entry.family})
    entries = ours + peer_entries(subject, budgets, folder)
    console.print(f"{name}: {len(entries)} contestants at about {budgets} bytes, {len(subject.held_out)} rows held out")
    fidelities = compare([one.contestant for one in entries], subject.held_out, [one.kept for one in entries])
    defaults = [entry for entry in entries if entry.is_default]
    timed = dict(zip(map(id, defaults), rates(defaults, subject.held_out), strict=True))
    return [
        {
            "teacher": name, "rows": len(subject.held_out), "family": entry.family,
            "setting": entry.contestant.setting, "is_ours": entry.is_ours, "is_default": entry.is_default,
            **asdict(entry.sizes), **(asdict(timed[id(entry)]) if entry.is_default else {}),
            "fidelity": {f"{one.temperature:g}": asdict(one) for one in fidelity},
        }
        for entry, fidelity in zip(entries, fidelities, strict=True)
    ]  # fmt: skip


def write(document: dict[str, Any], results: Path) -> None:
    """Write the figures as JSON and draw them; the usual file's tables go into docs/fidelity.md too."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(_rounded(document), indent=1) + "\n")
    if results != RESULTS:
        draw(document["lines"], results.with_suffix(""))
        return
    draw(document["lines"], PICTURE)
    PAGE.write_text(filled(PAGE.read_text(), all_tables(document)))


def _row(line: dict[str, Any]) -> dict[str, Any]:
    fidelity = line["fidelity"]
    return {
        "teacher": line["teacher"], "kept_by": line["family"], "set_to": line["setting"],
        "bytes_a_row": line["row_bytes"], **{f"KL_T={at}": fidelity[at]["kl_mean"] for at in ("1", "2", "4", "20")},
        "worst_row": max(one["kl_max"] for one in fidelity.values()), "L1_T=1": fidelity["1"]["l1_mean"],
        "encode_rows_per_second": line["encode_rows_per_second"],
        "decode_rows_per_second": line["decode_rows_per_second"],
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _machine() -> dict[str, Any]:
    return {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
