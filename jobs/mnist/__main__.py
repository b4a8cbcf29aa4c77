"""Reproduce the MNIST section of Hinton, Vinyals and Dean (2015) from one cache.

    python -m jobs.mnist

Fetches the data, trains the teacher where it is missing, builds the cache, trains the students from the cache alone,
measures them, and writes docs/results/mnist.json, the tables and pictures of docs/mnist.md. Every step is skipped where
its work is done, so a run that was stopped is continued by the same command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.mnist.measure import measure
from jobs.mnist.page import write_page, write_pictures
from jobs.mnist.results import Results
from jobs.mnist.steps import JOB_FILE, OUT, prepare_teacher, train_students
from jobs.mnist.tables import TABLES, as_rich
from kdcache.build import build_job
from kdcache.errors import KdcacheError
from kdcache.jobs import read_job

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results" / "mnist.json"


def main(
    *,
    processes: Annotated[int, typer.Option(min=1, help="Sweeps trained at the same time, one thread each.")] = 2,
    only: Annotated[list[str] | None, typer.Option(metavar="SWEEP", help="Train only this; may be repeated.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Only the tables, pictures and page.")] = False,
) -> None:
    """Reproduce the paper's MNIST section from one cache; the same command continues a run that was stopped."""
    try:
        if not report_only:
            _run(only, processes=processes)
        if not only:
            _report()
    except KdcacheError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _run(only: list[str] | None, *, processes: int) -> None:
    loaded = read_job(JOB_FILE)
    teacher = prepare_teacher(loaded)
    cache = build_job(loaded)
    typer.echo(f"teacher: {teacher}\ncache: {cache.num_examples:,} examples at {cache.address}")
    sweeps = only or [sweep.name for sweep in loaded.job.students]
    train_students(JOB_FILE, sweeps, out=OUT, num_processes=processes, report=typer.echo)
    if not only:
        measure(loaded, cache, teacher=teacher, out=OUT).write(RESULTS)


def _report() -> None:
    results = Results.read(RESULTS)
    console = Console()
    for make_table in TABLES.values():
        console.print(as_rich(make_table(results)))
    write_page(DOCS / "mnist.md", results)
    write_pictures(DOCS / "images", results)
    typer.echo(f"results: {RESULTS}\npage: {DOCS / 'mnist.md'}")


if __name__ == "__main__":
    typer.run(main)
