"""`kdcache plan` and `kdcache build`."""

from __future__ import annotations

__all__ = ["build", "plan"]

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kdcache import jobs
from kdcache.build import BuildProgress, Forecast, build_job, plan_job, read_status
from kdcache.cli.output import (
    Json,
    Threads,
    console,
    print_json,
    progress_bar,
    readable_bytes,
    readable_seconds,
    say,
    use_threads,
)
from kdcache.documents import CertificateDocument, DaskCluster, DaskLocal, ExecutorSpec
from kdcache.errors import JobError
from kdcache.jobs import LoadedJob

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A TOML job file.", show_default=False)]
AddTeachers = Annotated[bool, typer.Option("--add-teachers", help="Add the job's new teachers to a standing cache.")]


def plan(job: JobFile, json: Json = False, add_teachers: AddTeachers = False, threads: Threads = None) -> None:
    """Show what a build would write: rows, shards, and the pilot's forecast of size, fidelity and time."""
    use_threads(threads)
    _print_forecast(plan_job(jobs.read_job(job), add_teachers=add_teachers), json=json)


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
        _print_forecast(plan_job(loaded, executor=executor, add_teachers=add_teachers), json=json)
        return
    with progress_bar("rows") as show:

        def on_progress(step: BuildProgress) -> None:
            show(f"{step.stage} {step.teacher}", step.done_rows, step.total_rows)

        cache = build_job(loaded, executor=executor, add_teachers=add_teachers, on_progress=on_progress)
    status = read_status(cache.address)
    num_bytes = sum(teacher.num_bytes for teacher in status.teachers)
    complete = cache.complete
    if json:
        print_json({
            "address": cache.address, "num_bytes": num_bytes, "num_rows": cache.document.num_rows,
            "teachers": list(cache.teacher_names), "data_digest": complete.data_digest if complete else None,
        })  # fmt: skip
        return
    rows = cache.document.num_rows * cache.num_views * len(cache.teachers)
    say(
        f"[bold]{escape(cache.address)}[/bold] is complete: {cache.num_examples:,} examples, "
        f"{len(cache.teachers)} stored teacher(s), {readable_bytes(num_bytes)} ({num_bytes / rows:.3g} bytes a row)"
    )


def _executor(loaded: LoadedJob, *, workers: int | None, dask: str | None) -> ExecutorSpec:
    if workers is not None and dask is not None:
        raise JobError("--workers and --dask name two executors; give one of them. Nothing was written")
    if workers is not None:
        return DaskLocal.make(num_workers=workers)
    return DaskCluster.make(address=dask) if dask is not None else loaded.job.build.executor


def _print_forecast(forecast: Forecast, *, json: bool) -> None:
    cache = forecast.plan.cache
    if json:
        print_json(_forecast_as_json(forecast))
        return
    say(
        f"[bold]{escape(forecast.address)}[/bold]: {cache.num_examples:,} examples, "
        f"{cache.num_rows * cache.num_views:,} rows of {cache.num_classes:,} classes; "
        f"{cache.num_shards:,} shards of {cache.shard_rows:,} rows a teacher"
    )
    table = Table("teacher", "pilot rows", "bytes a row", "KL at 1", "KL at 4", "p99 KL", "largest KL", "rows/s")
    for item in forecast.teachers:
        mean = dict(zip(item.certificate.temperatures, item.certificate.mean_kl, strict=True))
        table.add_row(
            item.name,
            f"{item.num_pilot_rows:,}",
            f"{item.bytes_per_row:.3g}",
            f"{mean[1.0]:.2g}",
            f"{mean[4.0]:.2g}",
            f"{_largest_p99(item.certificate):.2g}",
            f"{max(item.certificate.max_kl):.2g}",
            f"{1 / max(item.inference_seconds_per_row, item.encode_seconds_per_row, 1e-9):,.0f}",
        )
    console.print(table)
    say(
        f"forecast: {readable_bytes(forecast.num_bytes)} and {readable_seconds(forecast.seconds)} in this process; "
        "nothing was written"
    )


def _largest_p99(certificate: CertificateDocument) -> float:
    pairs = zip(certificate.kl_histograms, certificate.max_kl, strict=True)
    return max(histogram.quantile(0.99, largest=largest) for histogram, largest in pairs)


def _forecast_as_json(forecast: Forecast) -> dict[str, Any]:
    return {
        "address": forecast.address,
        "plan": forecast.plan.to_mapping(),
        "num_bytes": forecast.num_bytes,
        "seconds": forecast.seconds,
        "teachers": [
            {
                "name": item.name,
                "num_pilot_rows": item.num_pilot_rows,
                "bytes_per_row": item.bytes_per_row,
                "inference_seconds_per_row": item.inference_seconds_per_row,
                "encode_seconds_per_row": item.encode_seconds_per_row,
                "certificate": item.certificate.to_mapping(),
            }
            for item in forecast.teachers
        ],
    }
