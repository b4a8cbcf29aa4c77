"""`kdcache plan` and `kdcache build`."""

from __future__ import annotations

__all__ = ["build", "plan"]

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdcache import jobs
from kdcache.build import BuildProgress, build_job, plan_job, read_status
from kdcache.cli.forecast import memory_in_words, plot_forecast, print_forecast
from kdcache.cli.output import (
    Json,
    Threads,
    print_json,
    progress_bar,
    say,
    sizes_as_json,
    stored_sizes,
    use_threads,
)
from kdcache.documents import DaskCluster, DaskLocal, ExecutorSpec
from kdcache.errors import JobError, OptionError
from kdcache.jobs import LoadedJob
from kdcache.report import check_picture

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A TOML job file.", show_default=False)]
AddTeachers = Annotated[bool, typer.Option("--add-teachers", help="Add the job's new teachers to a standing cache.")]


def plan(
    job: JobFile,
    json: Json = False,
    max_kl: Annotated[float | None, typer.Option(help="In place of the job's codec: the KL to reach, in nats.")] = None,
    bytes_per_row: Annotated[float | None, typer.Option(help="In place of the job's codec: bytes to keep to.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw size and fidelity: .png or .svg.")] = None,
    add_teachers: AddTeachers = False,
    threads: Threads = None,
) -> None:
    """Show what a build would write: the codecs measured on the pilot, the choice, and the forecast."""
    use_threads(threads)
    if max_kl is not None and bytes_per_row is not None:
        raise OptionError("--max-kl and --bytes-per-row exclude each other; give one of them. Nothing was written")
    if plot is not None:
        check_picture(plot)
    forecast = plan_job(jobs.read_job(job), add_teachers=add_teachers, max_kl=max_kl, bytes_per_row=bytes_per_row)
    print_forecast(forecast, json=json)
    if plot is not None:
        written = plot_forecast(forecast, plot)
        if not json:
            say(f"drawn: {escape(str(written))}")


def build(
    job: JobFile,
    json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As `kdcache plan`: write nothing.")] = False,
    add_teachers: AddTeachers = False,
    workers: Annotated[int | None, typer.Option(help="Use a Dask LocalCluster of so many processes.")] = None,
    dask: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Use the Dask cluster at this address.")] = None,
    threads: Threads = None,
) -> None:
    """Build the job's cache, or go on with it after a stop."""
    use_threads(threads)
    loaded = jobs.read_job(job)
    executor = _executor(loaded, workers=workers, dask=dask)
    if dry_run:
        print_forecast(plan_job(loaded, executor=executor, add_teachers=add_teachers), json=json)
        return
    with progress_bar("rows") as show:

        def on_progress(step: BuildProgress) -> None:
            if step.task_memory is not None and not json:
                say(memory_in_words(step.task_memory))
            show(f"{step.stage} {step.teacher}", step.done_rows, step.total_rows)

        cache = build_job(loaded, executor=executor, add_teachers=add_teachers, on_progress=on_progress)
    complete = cache.complete
    if json:
        num_bytes = sum(teacher.num_bytes for teacher in read_status(cache.address).teachers)
        print_json({
            "address": cache.address, "num_bytes": num_bytes, "num_rows": cache.document.num_rows,
            "teachers": list(cache.teacher_names), "data_digest": complete.data_digest if complete else None,
            "sizes": sizes_as_json(cache),
        })  # fmt: skip
        return
    say(
        f"[bold]{escape(cache.address)}[/bold] is complete: {cache.num_examples:,} examples, "
        f"{len(cache.teachers)} stored teacher(s), {stored_sizes(cache)}"
    )


def _executor(loaded: LoadedJob, *, workers: int | None, dask: str | None) -> ExecutorSpec:
    if workers is not None and dask is not None:
        raise JobError("--workers and --dask name two executors; give one of them. Nothing was written")
    if workers is not None:
        return DaskLocal.make(num_workers=workers)
    return DaskCluster.make(address=dask) if dask is not None else loaded.job.build.executor
