"""The page docs/mnist.md: its tables are written between markers, from the results document; its words by hand.

A block begins with ``<!-- table NAME -->`` and ends with ``<!-- end -->``, each on a line of its own.
"""

from __future__ import annotations

__all__ = ["fill", "write_page", "write_pictures"]

import re
from pathlib import Path

from jobs.mnist.data import publish
from jobs.mnist.results import Results, Student
from jobs.mnist.tables import TABLES, as_markdown
from kdcache.errors import JobError
from kdcache.report import student_curves

_BLOCK = re.compile(r"(?<=<!-- table )([a-z0-9-]+)( -->\n).*?(?=^<!-- end -->$)", re.DOTALL | re.MULTILINE)


def fill(page: str, results: Results) -> str:
    """Give the page with its tables made anew.

    Raises
    ------
    JobError
        The page names a table that does not exist, or leaves one out.
    """
    named = [match.group(1) for match in _BLOCK.finditer(page)]
    if sorted(named) != sorted(TABLES):
        raise JobError(f"the page has the tables {sorted(named)}; expected each of {sorted(TABLES)} once")
    return _BLOCK.sub(lambda match: f"{match[1]}{match[2]}{as_markdown(TABLES[match[1]](results))}\n", page)


def write_page(path: Path, results: Results) -> None:
    """Make the tables of a page anew, in place."""
    publish(fill(path.read_text(encoding="utf-8"), results).encode(), path)


def write_pictures(folder: Path, results: Results) -> tuple[Path, ...]:
    """Draw test error over temperature, for 30 and for 300 units a layer; give the files written.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    written: tuple[Path, ...] = ()
    for units, sweeps in ((30, ("units-30-soft", "units-30-hard")), (300, ("units-300-soft",))):
        lines = [_as_line(student, results) for sweep in sweeps for student in results.of(sweep)]
        name, title = f"mnist-temperature-{units}-units", f"MNIST, students of 2 x {units} units"
        written += student_curves(lines, folder / name, title=title)
    return written


def _as_line(student: Student, results: Results) -> dict[str, str | float | None]:
    """Give a student as a metrics line; all sweeps of a picture go under one name, and differ in soft weight."""
    return {
        "sweep": "students",
        "temperature": student.temperature,
        "soft_weight": student.soft_weight,
        "seed": student.seed,
        "test_error": student.num_errors / results.num_test,
    }
