"""`kdcache status` and `kdcache info`: they change nothing."""

from __future__ import annotations

__all__ = ["Target", "info", "status"]

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from kdcache.build import read_status
from kdcache.build.status import CacheStatus
from kdcache.cache import SoftTargetCache, open_cache
from kdcache.certificate import Certificate
from kdcache.cli.output import (
    INCOMPLETE,
    Json,
    address_of,
    console,
    print_json,
    readable_bytes,
    say,
    sizes_as_json,
    stored_sizes,
)
from kdcache.documents import TopK, codec_in_full

_COLUMNS = (
    ("mean\nKL", "mean_kl"),
    ("p99\nKL", "p99_kl"),
    ("largest\nKL", "max_kl"),
    ("bound\nmean", "bound_mean"),
    ("bound\np99", "bound_p99"),
    ("KL at\nmost", "kl_bound"),
    ("total\nvariation", "total_variation_bound"),
)
"""Titles, and the fields of the certificate."""

Target = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's address, or a job file.", show_default=False)]


def status(cache: Target, json: Json = False) -> None:
    """Show how far a build is, not whether its files are sound (`verify`). Exit code 3 while it is not complete."""
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
        say(f"{escape(found.address)} {_how_far(found)}")
    if not found.is_complete:
        raise typer.Exit(INCOMPLETE)


def _how_far(found: CacheStatus) -> str:
    if found.is_complete:
        return "is complete"
    if all(teacher.done_shards == teacher.num_shards for teacher in found.teachers):
        return f"has all its shards but no complete.json; `kdcache repair {escape(found.address)}` writes it anew"
    return "is not complete; run its build again"


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
    if json:
        print_json(
            {
                "address": opened.address,
                "cache": opened.document.to_mapping(),
                "complete": complete.to_mapping() if complete else None,
                "teachers": {name: document.to_mapping() for name, document in opened.teachers.items()},
                "sizes": sizes_as_json(opened),
                "certificates": [dataclasses.asdict(item) for item in certificates],
            }
        )
        return
    say(
        f"[bold]{escape(opened.address)}[/bold]: {opened.num_examples:,} examples x {opened.num_views} view(s), "
        f"{opened.num_classes:,} classes, {len(opened.teachers)} stored teacher(s), {stored_sizes(opened)}"
    )
    for what, names in _alike(opened).items():
        say(f"  {escape(', '.join(names))}: {escape(what)}")
    table = Table(title="stated error", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for title in ("temper-\nature", *(title for title, _ in _COLUMNS)):
        table.add_column(title, no_wrap=True)
    for item in certificates:
        values = [getattr(item, name) for _, name in _COLUMNS]
        table.add_row(f"{item.temperature:g}", *("-" if value is None else f"{value:.2g}" for value in values))
    console.print(table)
    for sentence in _notes(opened, certificates):
        say(sentence)


def _notes(cache: SoftTargetCache, certificates: Sequence[Certificate]) -> Iterator[str]:
    """Say why figures are missing, and what is not in those that are there."""
    if any(item.mean_kl is None for item in certificates):
        measured = [set(item.temperatures) for item in cache.certificates.values()]
        common = ", ".join(f"{value:g}" for value in sorted(set.intersection(*measured)))
        yield f"KL was measured at temperatures {common} only; at others only the bounds hold."
    if any(item.kl_bound is None for item in certificates):
        yield "No bound where what is decoded depends on the temperature (topk), but for a target's at 1, 2 and 4."
    if any(item.bound_mean is None and item.kl_bound is not None for item in certificates):
        yield "The closer bounds start at temperature 1."
    sampled = [
        name
        for name, document in cache.teachers.items()
        if isinstance(document.codec, TopK) and document.codec.tail == "samples"
    ]
    if sampled:
        yield (
            f"{escape(', '.join(sampled))}: KL is of the kept classes and all others as one class; how the sampled "
            "tail is shared out is not in it."
        )


def _alike(cache: SoftTargetCache) -> dict[str, list[str]]:
    """Group the teachers that have the same codec and come from the same source."""
    groups: dict[str, list[str]] = {}
    for name, document in cache.teachers.items():
        codec = codec_in_full(document.codec)
        sources = ", ".join(dict.fromkeys(member.source for member in document.members))
        groups.setdefault(f"{codec}; from {sources}", []).append(name)
    return groups
