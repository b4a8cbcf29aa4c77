"""`kdcache verify`: it changes nothing."""

from __future__ import annotations

__all__ = ["verify"]

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kdcache import jobs
from kdcache.build import Comparison, compare_job
from kdcache.cli.inspect import Target
from kdcache.cli.output import (
    CORRUPT,
    INCOMPLETE,
    Json,
    Threads,
    address_of,
    console,
    print_json,
    progress_bar,
    readable_bytes,
    say,
    use_threads,
)
from kdcache.errors import OptionError
from kdcache.verify import Finding, Level, VerifyReport, verify_cache

MOST_NOTES = 10


def verify(
    cache: Target,
    quick: Annotated[bool, typer.Option("--quick", help="Documents and sizes alone: no shard is read.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every row, and look every example up.")] = False,
    against_teacher: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Also recompute N rows with the job's teachers; needs a job file."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With which those rows are drawn.")] = 0,
    resume_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Go on after a stop: a file that says what was found sound.")
    ] = None,
    json: Json = False,
    threads: Threads = None,
) -> None:
    """Hold what stands against what vouches for it. Exit code 4 where something is wrong, 3 where it is incomplete."""
    use_threads(threads)
    if quick and deep:
        raise OptionError("--quick and --deep exclude each other; give one of them. Nothing was looked at")
    if against_teacher is not None and not cache.endswith(".toml"):
        raise OptionError("--against-teacher runs the teachers, so it needs the job file in place of the cache")
    level: Level = "quick" if quick else "deep" if deep else "digests"
    with progress_bar("shards") as show:
        report = verify_cache(
            address_of(cache),
            level=level,
            resume_file=resume_file,
            on_progress=lambda done, total: show("verifying", done, total),
        )
    comparison = None
    if against_teacher is not None and report.is_sound and report.is_complete:
        comparison = compare_job(jobs.read_job(cache), num_rows=against_teacher, seed=seed)
    findings = (*report.findings, *(comparison.findings if comparison else ()))
    if json:
        print_json(as_json(report, comparison, findings))
    else:
        _print(report, comparison, findings)
        if against_teacher is not None and comparison is None:
            say("the teachers were not run: first mend the cache, or finish its build")
    if findings:
        raise typer.Exit(CORRUPT)
    if not report.is_complete:
        raise typer.Exit(INCOMPLETE)


def as_json(
    report: VerifyReport, comparison: Comparison | None = None, findings: Iterable[Finding] | None = None
) -> dict[str, Any]:
    """Give a report as JSON holds it."""
    told = list(report.findings if findings is None else findings)
    body = {
        "address": report.address,
        "level": report.level,
        "is_complete": report.is_complete,
        "is_sound": not told,
        "num_shards": report.num_shards,
        "num_bytes": report.num_bytes,
        "num_skipped": report.num_skipped,
        "findings": [dataclasses.asdict(item) for item in told],
        "notes": [dataclasses.asdict(item) for item in report.notes],
    }
    if comparison is not None:
        teachers = [dataclasses.asdict(teacher) for teacher in comparison.teachers]
        body["against_teacher"] = {"seed": comparison.seed, "teachers": teachers}
    return body


def print_findings(findings: Iterable[Finding]) -> None:
    """Print each finding, and once what mends those that are alike."""
    remedies: dict[str, None] = {}
    for item in findings:
        say(f"[red]{escape(item.where)}[/red]: {escape(item.what)} ({item.kind.replace('_', ' ')})")
        remedies[item.remedy] = None
    for remedy in remedies:
        say(escape(remedy))


def _print(report: VerifyReport, comparison: Comparison | None, findings: tuple[Finding, ...]) -> None:
    print_findings(findings)
    for note in report.notes[:MOST_NOTES]:
        say(f"[dim]{escape(note.key)}[/dim] {escape(note.what)}")
    if len(report.notes) > MOST_NOTES:
        say(f"and {len(report.notes) - MOST_NOTES:,} more files that are no part of the cache")
    if comparison is not None:
        _print_comparison(comparison)
    said = f"{len(findings)} finding(s)" if findings else "nothing wrong"
    looked = {"quick": "sizes", "digests": "digests", "deep": "digests and rows"}[report.level]
    skipped = f", {report.num_skipped:,} of them looked at before" if report.num_skipped else ""
    size = readable_bytes(report.num_bytes)
    say(f"{escape(report.address)}: {looked} of {report.num_shards:,} shards, {size}{skipped}: {said}")
    if not report.is_complete:
        say(
            "the cache is not complete: shards that are still to be built were not looked for. Run its build again; "
            f"or, where `kdcache status` shows all shards, `kdcache repair {escape(report.address)}`"
        )


def _print_comparison(comparison: Comparison) -> None:
    table = Table("teacher", "temperature", "rows", "mean KL", "largest KL", "certified", "largest difference")
    for teacher in comparison.teachers:
        difference = teacher.largest_logit_difference
        columns = zip(teacher.temperatures, teacher.mean_kl, teacher.max_kl, teacher.certified_kl, strict=True)
        for temperature, *figures in columns:
            cells = [f"{value:.3g}" for value in figures]
            last = "-" if difference is None else f"{difference:.3g}"
            table.add_row(teacher.name, f"{temperature:g}", f"{teacher.num_rows:,}", *cells, last)
    console.print(table)
    say(f"rows drawn with seed {comparison.seed}; differences are of logits, each row shifted to make them least")
