"""Reproduce the MNIST section of Hinton, Vinyals and Dean (2015) from one cache.

    python -m jobs.mnist

Every step is skipped where its work is done, so a run that was stopped is continued by the same command.
"""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.mnist.steps import JOB_FILE, OUT, build, prepare_teacher, train_students
from kdcache.errors import KdcacheError
from kdcache.jobs import read_job


def main(
    processes: Annotated[int, typer.Option(min=1, help="Sweeps trained at the same time, one thread each.")] = 2,
    only: Annotated[
        list[str] | None, typer.Option(metavar="SWEEP", help="Train only this one; may be repeated.")
    ] = None,
) -> None:
    """Fetch the data, train the teacher, build the cache, train the students."""
    try:
        loaded = read_job(JOB_FILE)
        typer.echo(f"teacher: {prepare_teacher(loaded)}")
        cache = build(loaded)
        typer.echo(f"cache: {cache.num_examples:,} examples at {cache.address}")
        sweeps = only or [sweep.name for sweep in loaded.job.students]
        train_students(JOB_FILE, sweeps, out=OUT, num_processes=processes, report=typer.echo)
    except KdcacheError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
