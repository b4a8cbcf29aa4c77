"""What the commands print: tables for people, JSON for machines, progress on stderr."""

from __future__ import annotations

__all__ = [
    "CORRUPT",
    "INCOMPLETE",
    "INTERRUPTED",
    "Json",
    "Threads",
    "address_of",
    "console",
    "exit_code_of",
    "print_error",
    "print_json",
    "progress_bar",
    "readable_bytes",
    "readable_seconds",
    "say",
    "sizes_as_json",
    "sizes_in_words",
    "stored_sizes",
    "use_threads",
]

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdcache import jobs
from kdcache.cache import SoftTargetCache
from kdcache.documents import GIVEN
from kdcache.errors import (
    CorruptCacheError,
    DocumentError,
    ExecutorError,
    IncompleteCacheError,
    KdcacheError,
    StoreError,
)

FAILED = 1
BAD_INPUT = 2
INCOMPLETE = 3
CORRUPT = 4
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

Threads = Annotated[int | None, typer.Option(min=1, help="Torch threads of this process; torch's default if absent.")]

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, progress is a line now and then."""

_FILE_COLUMNS = 200
"""Width of tables that go into a file or a pipe; the variable COLUMNS says otherwise."""

_IS_FILE = not sys.stdout.isatty() and "COLUMNS" not in os.environ
# Rich takes a width without a height for none where there is no terminal.
console = Console(width=_FILE_COLUMNS, height=25) if _IS_FILE else Console()
_errors = Console(stderr=True)


def exit_code_of(error: Exception) -> int:
    """Tell bad input, incomplete and corrupt apart, and from failures of another kind."""
    if not isinstance(error, KdcacheError):
        return FAILED
    if isinstance(error, StoreError) and error.errno is not None:  # the disk or the server, not what was asked for
        return FAILED
    if isinstance(error, IncompleteCacheError | ExecutorError):
        return INCOMPLETE
    if isinstance(error, DocumentError):
        return BAD_INPUT if error.document == "job" or error.source == GIVEN else CORRUPT
    return CORRUPT if isinstance(error, CorruptCacheError) else BAD_INPUT


def print_error(error: Exception, *, as_json: bool) -> None:
    """Print an error on stderr."""
    if as_json:
        body = {"error": type(error).__name__, "message": _in_full(error), "exit_code": exit_code_of(error)}
        sys.stderr.write(json.dumps(body) + "\n")
    else:
        _errors.print(f"[red]{type(error).__name__}[/red]: {escape(_in_full(error))}", soft_wrap=True)


def _in_full(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def say(text: str) -> None:
    """Print a line with markup on stdout; a long one is left to the terminal to wrap, so that addresses stay whole."""
    console.print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def address_of(target: str) -> str:
    """Give a cache's address: the argument itself, or the address in a job file."""
    return jobs.read_job(target).cache_address if target.endswith(".toml") else target


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[str, float, float], None]]:
    """Show a bar with rate and time left on stderr; gives a function (text, done, total)."""
    if not _errors.is_terminal:
        yield _line_now_and_then(unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_errors) as progress:
        task = progress.add_task("starting", total=1, rate="")

        def update(text: str, done: float, total: float) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            progress.update(task, description=text, completed=done, total=total, rate=rate)

        yield update


def _line_now_and_then(unit: str) -> Callable[[str, float, float], None]:
    start = last = time.monotonic()

    def update(text: str, done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES or not done:
            return
        last = now
        rate = done / (now - start)
        left = readable_seconds((total - done) / rate)
        sys.stderr.write(f"{text}: {done:,.0f} of {total:,.0f} {unit}, {rate:,.0f} a second, {left} left\n")

    return update


def use_threads(count: int | None) -> None:
    """Set torch's threads where the user asked for it."""
    if count is not None:
        import torch  # the commands that only look at a cache's documents do without it

        torch.set_num_threads(count)


def sizes_in_words(
    *, codes: float, parameters: float, ids_and_documents: float | None = None, num_rows: int, num_teachers: int
) -> str:
    """Write what a cache takes, the whole first; before it is built, ids and documents are not known.

    Parameters
    ----------
    codes, parameters, ids_and_documents : float
        Bytes of all teachers.
    num_rows : int
        Rows that each teacher stores.
    num_teachers : int
        Stored teachers.
    """
    whole = codes + parameters + (ids_and_documents or 0)
    each = "bytes a row" if num_teachers == 1 else "bytes a row and teacher"
    parts = [f"codes {readable_bytes(codes)}", f"parameters {readable_bytes(parameters)}"]
    parts += [] if ids_and_documents is None else [f"ids and documents {readable_bytes(ids_and_documents)}"]
    about = "; ids and documents come on top" if ids_and_documents is None else ""
    return f"{readable_bytes(whole)}, {whole / num_rows / num_teachers:,.4g} {each} ({', '.join(parts)}{about})"


def stored_sizes(cache: SoftTargetCache) -> str:
    """Write what a cache that stands takes on disk."""
    sizes = cache.sizes()
    return sizes_in_words(
        codes=sizes.code_bytes,
        parameters=sizes.parameter_bytes,
        ids_and_documents=sizes.id_bytes + sizes.document_bytes,
        num_rows=cache.document.num_rows * cache.num_views,
        num_teachers=len(cache.teachers),
    )


def sizes_as_json(cache: SoftTargetCache) -> dict[str, float]:
    """Give what a cache that stands takes on disk, as JSON holds it."""
    sizes = cache.sizes()
    rows = cache.document.num_rows * cache.num_views * len(cache.teachers)
    return {**dataclasses.asdict(sizes), "num_bytes": sizes.num_bytes, "bytes_per_row": sizes.num_bytes / rows}


def readable_bytes(count: float) -> str:
    """Write a size for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def readable_seconds(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
