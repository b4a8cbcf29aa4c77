"""`kdcache repair`: drop what is bad, write anew what follows from the rest, build what is missing."""

from __future__ import annotations

__all__ = ["repair"]

import dataclasses
import sys
from typing import Annotated

import typer
from rich.markup import escape

from kdcache.build import BuildProgress
from kdcache.cli.output import CORRUPT, INCOMPLETE, Json, Threads, print_json, progress_bar, say, use_threads
from kdcache.errors import OptionError
from kdcache.repair import RepairReport, repair_cache

Target = Annotated[
    str,
    typer.Argument(
        metavar="CACHE|JOB",
        help="A cache's address; or its job file, with whose teachers it is rebuilt.",
        show_default=False,
    ),
]

_DONE = {
    "drop": "It was taken away",
    "write": "It was written anew",
    "fit": "It was fitted again",
    "build": "It is to be built",
    "built": "Built",
    "keep": "It was kept",
    "cannot": "It cannot be mended here",
}
_PLANNED = {
    **_DONE,
    "drop": "It would be taken away",
    "write": "It would be written anew",
    "fit": "It would be fitted again",
}


def repair(
    target: Target,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before anything is dropped.")] = False,
    json: Json = False,
    threads: Threads = None,
) -> None:
    """Drop what is bad, write anew what can be, build what is missing. Exit code 3: build it; 4: nothing mends it.

    A dry run ends with the code that the repair would end with.
    """
    use_threads(threads)
    if not dry_run and not yes:
        _ask(target, json=json)
    report = _run(target, dry_run=dry_run)
    if json:
        print_json({**dataclasses.asdict(report), "exit_code": _exit_code(report)})
    else:
        _print(report)
    if code := _exit_code(report):
        raise typer.Exit(code)


def _ask(target: str, *, json: bool) -> None:
    """Show what a repair would do, and ask."""
    report = _run(target, dry_run=True)
    if not report.actions:  # nothing would be taken away
        return
    if json or not sys.stdin.isatty():
        raise OptionError(
            "a repair takes bad files away: see what it would do with --dry-run, and say --yes to do it without being "
            "asked. Nothing was changed"
        )
    _print(report)
    if not typer.confirm("Go on?"):
        raise typer.Exit(_exit_code(report))


def _run(target: str, *, dry_run: bool) -> RepairReport:
    with progress_bar("steps") as show:

        def on_progress(step: BuildProgress) -> None:
            show(f"{step.stage} {step.teacher}, rows", step.done_rows, step.total_rows)

        is_job = target.endswith(".toml")
        return repair_cache(
            None if is_job else target,
            job=target if is_job else None,
            dry_run=dry_run,
            on_verified=lambda done, total: show("verifying, shards", done, total),
            on_progress=on_progress,
        )


def _print(report: RepairReport) -> None:
    words = _PLANNED if report.is_dry_run else _DONE
    for action in report.actions:
        then = f". {action.then}" if action.then else ""
        say(f"[bold]{escape(action.key)}[/bold]: {escape(action.why)}. {words[action.verb]}{escape(then)}")
    address = escape(report.address)
    if report.is_dry_run:
        say(f"{address}: {len(report.actions)} step(s); nothing was changed")
    elif report.hopeless:
        say(f"{address}: {len(report.hopeless)} file(s) cannot be mended here")
    elif report.command is None:
        said = "mended" if report.actions else "nothing to mend"
        say(f"{address}: {said}; {'it is complete' if report.is_complete else 'it is not complete'}")
    if report.command is not None:
        shards = f"{report.num_missing_shards:,} shard(s) are to be built. " if report.num_missing_shards else ""
        say(f"{address} is not whole yet. {shards}Run `{escape(report.command)}`")


def _exit_code(report: RepairReport) -> int:
    if report.hopeless:
        return CORRUPT
    if report.command is not None:
        return INCOMPLETE
    return CORRUPT if report.findings and not report.is_dry_run else 0
