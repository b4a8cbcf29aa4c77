"""The `kdcache` command: parse, one library call, print.

Exit codes: 0 done, 1 unexpected failure, 2 bad input, 3 incomplete, 4 corrupt, 130 interrupted.
"""

from __future__ import annotations

__all__ = ["app", "main"]

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kdcache import __version__
from kdcache.cli import build, inspect, repair, train, verify
from kdcache.cli.output import INTERRUPTED, exit_code_of, print_error
from kdcache.errors import KdcacheError

app = typer.Typer(
    name="kdcache",
    help="Run an ensemble of teachers once, keep its logits, train students at any temperature from the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"kdcache {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def _add(name: str, command: Callable[..., None]) -> None:
    @functools.wraps(command)
    def interruptible(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:  # Typer would end with code 1, as if the command had failed
            told = ["interrupted; what is published is kept, the same command goes on from there"]
            sys.stderr.write("".join(f"{line}\n" for line in (*told, *getattr(interrupt, "__notes__", ()))))
            sys.exit(INTERRUPTED)

    app.command(name)(interruptible)


_add("plan", build.plan)
_add("build", build.build)
_add("status", inspect.status)
_add("verify", verify.verify)
_add("repair", repair.repair)
_add("info", inspect.info)
_add("train", train.train)


def main() -> None:
    """Run the command line; kdcache's own errors become a message and an exit code."""
    as_json = "--json" in sys.argv
    try:
        app()
    except KdcacheError as error:
        print_error(error, as_json=as_json)
        sys.exit(exit_code_of(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # such as a file that may not be read; it names the file
        print_error(error, as_json=as_json)
        sys.exit(exit_code_of(error))
