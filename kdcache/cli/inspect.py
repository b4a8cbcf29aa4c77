"""`kdcache status`, `kdcache verify` and `kdcache info`: they change nothing."""

from __future__ import annotations

__all__ = ["info", "status", "verify"]

import dataclasses
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from kdcache.build import read_status
from kdcache.cache import SoftTargetCache, open_cache
from kdcache.cli.output import (
    CORRUPT,
    INCOMPLETE,
    Json,
    address_of,
    console,
    print_json,
    progress_bar,
    readable_bytes,
    say,
)
from kdcache.verify import verify_cache

_COLUMNS = (
    ("mean KL", "mean_kl"),
    ("p99 KL", "p99_kl"),
    ("largest KL", "max_kl"),
    ("bound mean", "bound_mean"),
    ("bound p99", "bound_p99"),
    ("KL at most", "kl_bound"),
    ("total variation", "total_variation_bound"),
)
"""Titles, and the fields of the certificate."""

Target = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's address, or a job file.", show_default=False)]


def status(cache: Target, json: Json = False) -> None:
    """Show how far a build is. Exit code 3 while it is not complete."""
    found = read_status(address_of(cache))
    if json:
        print_json(
            {
                "address": found.address,
                "is_complete": found.is_complete,
                "teachers": [dataclasses.asdict(teacher) for teacher in found.teachers],
            }
        )
    else:
        table = Table("teacher", "shards", "rows", "stored")
        for item in found.teachers:
            table.add_row(
                item.name,
                f"{item.done_shards:,} of {item.num_shards:,}",
                f"{item.done_rows:,} of {item.num_rows:,}",
                readable_bytes(item.num_bytes),
            )
        console.print(table)
        said = "is complete" if found.is_complete else "is not complete; run its build again"
        say(f"{escape(found.address)} {said}")
    if not found.is_complete:
        raise typer.Exit(INCOMPLETE)


def verify(cache: Target, json: Json = False) -> None:
    """Hold every stored file against its digest. Exit code 4 where something is wrong, 3 where it is incomplete."""
    with progress_bar("shards") as show:
        report = verify_cache(address_of(cache), on_progress=lambda done, total: show("verifying", done, total))
    if json:
        print_json(
            {
                "address": report.address,
                "is_complete": report.is_complete,
                "is_sound": report.is_sound,
                "num_shards": report.num_shards,
                "num_bytes": report.num_bytes,
                "findings": [dataclasses.asdict(finding) for finding in report.findings],
            }
        )
    else:
        for finding in report.findings:
            say(f"[red]{escape(finding.where)}[/red]: {escape(finding.what)}")
        said = "nothing wrong" if report.is_sound else f"{len(report.findings)} finding(s)"
        say(f"{escape(report.address)}: {report.num_shards:,} shards, {readable_bytes(report.num_bytes)}: {said}")
        if not report.is_complete:
            say("the cache is not complete: shards that are still to be built were not looked for")
    if not report.is_sound:
        raise typer.Exit(CORRUPT)
    if not report.is_complete:
        raise typer.Exit(INCOMPLETE)


def info(
    cache: Target,
    json: Json = False,
    temperature: Annotated[
        list[float] | None, typer.Option("--temperature", "-t", help="Temperatures to certify; may be repeated.")
    ] = None,
) -> None:
    """Show what a cache holds, and the stated error of its soft targets at several temperatures."""
    opened = open_cache(address_of(cache))
    certificates = [opened.certificate(value) for value in temperature or (1.0, 2.0, 4.0, 8.0, 20.0)]
    complete = opened.complete
    num_bytes = sum(teacher.num_bytes for teacher in complete.teachers) if complete else 0
    if json:
        print_json(
            {
                "address": opened.address,
                "cache": opened.document.to_mapping(),
                "complete": complete.to_mapping() if complete else None,
                "teachers": {name: document.to_mapping() for name, document in opened.teachers.items()},
                "certificates": [dataclasses.asdict(item) for item in certificates],
            }
        )
        return
    say(
        f"[bold]{escape(opened.address)}[/bold]: {opened.num_examples:,} examples x {opened.num_views} view(s), "
        f"{opened.num_classes:,} classes, {len(opened.teachers)} stored teacher(s), {readable_bytes(num_bytes)}"
    )
    for what, names in _alike(opened).items():
        say(f"  {escape(', '.join(names))}: {escape(what)}")
    table = Table("temperature", *(title for title, _ in _COLUMNS), title="stated error", box=SIMPLE, padding=0)
    for item in certificates:
        values = [getattr(item, name) for _, name in _COLUMNS]
        table.add_row(f"{item.temperature:g}", *("-" if value is None else f"{value:.2g}" for value in values))
    console.print(table)


def _alike(cache: SoftTargetCache) -> dict[str, list[str]]:
    """Group the teachers that have the same codec and come from the same source."""
    groups: dict[str, list[str]] = {}
    for name, document in cache.teachers.items():
        codec = ", ".join(str(value) for value in document.codec.to_mapping().values())
        sources = ", ".join(dict.fromkeys(member.source for member in document.members))
        groups.setdefault(f"{codec}; from {sources}", []).append(name)
    return groups
