"""The `kdcache` command: parse, one library call, print.

Exit codes: 0 done, 1 unexpected failure, 2 bad input, 3 incomplete, 4 corrupt, 130 interrupted.
"""

from __future__ import annotations

__all__ = ["app", "main"]

import os
import sys

import typer

from kdcache.cli import build, inspect, train
from kdcache.cli.output import exit_code_of, print_error
from kdcache.errors import KdcacheError

app = typer.Typer(
    name="kdcache",
    help="Run an ensemble of teachers once, keep its logits, train students at any temperature from the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("plan")(build.plan)
app.command("build")(build.build)
app.command("status")(inspect.status)
app.command("verify")(inspect.verify)
app.command("info")(inspect.info)
app.command("train")(train.train)


def main() -> None:
    """Run the command line; kdcache's own errors become a message and an exit code."""
    as_json = "--json" in sys.argv
    try:
        app()
    except KdcacheError as error:
        print_error(error, as_json=as_json)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is published is kept, the same command goes on from there\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
