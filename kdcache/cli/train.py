"""`kdcache train`."""

from __future__ import annotations

__all__ = ["train"]

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kdcache import jobs
from kdcache.cli.output import Json, console, print_json, progress_bar


def train(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A TOML job file.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of metrics, checkpoints and pictures.", show_default="out/students beside JOB")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train only this sweep; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="Where students train; auto takes cuda where there is one.")] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Drop checkpoints and metrics, start anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the students, train none.")] = False,
    json: Json = False,
) -> None:
    """Train the job's students from its cache alone, many side by side; goes on where it was stopped."""
    from kdcache.students import plan_students, train_job  # imported here: the other commands need no training

    loaded = jobs.read_job(job)
    folder = out or loaded.folder / "out" / "students"
    if dry_run:
        planned = plan_students(loaded, only=only)
        if json:
            print_json(planned)
        else:
            for item in planned:
                console.print(item)
        return
    with progress_bar("batches") as show:
        results = train_job(
            loaded,
            out=folder,
            only=only,
            device=device,
            resume=not restart,
            progress=lambda done, total, text: show(text, done, total),
        )
    if json:
        print_json([result.to_mapping() for result in results])
        return
    table = Table("sweep", "temperature", "soft weight", "seed", "test error", "bias corrected")
    for result in results:
        table.add_row(*result.as_row())
    console.print(table)
    console.print(f"metrics, students and pictures: {folder}")
