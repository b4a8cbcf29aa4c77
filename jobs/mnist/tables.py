"""The tables: the paper's figure beside ours, made from the results document alone."""

from __future__ import annotations

__all__ = ["TABLES", "Table", "as_markdown", "as_rich"]

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import rich.box
import rich.table

from jobs.mnist import paper
from jobs.mnist.analysis import Summary, excess, gap_recovered, summaries_by_temperature, summarise
from jobs.mnist.results import Correction, Results, Student

_BOLD = re.compile(r"\*\*(.+?)\*\*")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells.

    Parameters
    ----------
    title : str
    columns : tuple of str [column]
    rows : tuple of tuple of str [row][column]
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def as_markdown(table: Table) -> str:
    """Write a table as Markdown, without its title."""
    rule = ("---",) + ("---:",) * (len(table.columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.columns, rule, *table.rows))


def as_rich(table: Table) -> rich.table.Table:
    """Make a table for the terminal."""
    shown = rich.table.Table(title=table.title, title_justify="left", box=rich.box.SIMPLE)
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in table.rows:
        shown.add_row(*(_BOLD.sub(r"[bold]\1[/bold]", cell) for cell in row))
    return shown


def soft_against_hard(results: Results) -> Table:
    """Teacher, student on hard labels, student on soft targets, and the share of the gap that is recovered."""
    teacher = sum(results.teacher_errors_by_digit)
    hard, soft = _errors(results.of("units-800-hard")), _errors(results.of("units-800-soft"))
    paper_share = gap_recovered(hard=paper.HARD_ERRORS, soft=paper.SOFT_ERRORS, teacher=paper.TEACHER_ERRORS)
    share = gap_recovered(hard=hard.mean, soft=soft.mean, teacher=teacher)
    return Table(
        title="1. Test errors of 10,000",
        columns=("", "paper", "ours", "lowest to highest", "seeds"),
        rows=(
            ("teacher, 2 x 1200, dropout, jitter", str(paper.TEACHER_ERRORS), str(teacher), "", "1"),
            ("student, 2 x 800, hard labels", str(paper.HARD_ERRORS), *_spread(hard)),
            ("student, 2 x 800, soft targets at temperature 20", str(paper.SOFT_ERRORS), *_spread(soft)),
            ("share of the gap recovered", f"{paper_share:.0%}", f"**{share:.0%}**", "", ""),
        ),
    )


def temperatures(results: Results) -> Table:
    """Students of 30 and of 300 units a layer, temperature by temperature."""
    small, larger = (summaries_by_temperature(results.of(f"units-{units}-soft")) for units in (30, 300))
    best = min(small, key=lambda temperature: small[temperature].mean)
    above = excess(results.of("units-30-soft"), over=best)
    hard = _errors(results.of("units-30-hard"))
    rows = [("hard labels", "", _short(hard), "", "", "")]
    for temperature, summary in small.items():
        rows.append(
            (
                f"{temperature:g}",
                "clearly best" if paper.BEST_TEMPERATURES[0] <= temperature <= paper.BEST_TEMPERATURES[1] else "worse",
                f"**{_short(summary)}**" if temperature == best else _short(summary),
                "" if temperature == best else _with_error(above[temperature]),
                "about the same" if temperature > paper.LEVEL_ABOVE and temperature in larger else "",
                _short(larger[temperature]) if temperature in larger else "",
            )
        )
    return Table(
        title="2. Test errors of 10,000, by the temperature of the soft targets",
        columns=(
            "temperature",
            "30 units: paper",
            f"ours ({hard.count} seeds)",
            f"more than at {best:g}, seed by seed",
            "300 units: paper",
            f"ours ({_count(larger)} seeds)",
        ),
        rows=tuple(rows),
    )


def without_3(results: Results) -> Table:
    """All 3s left out of the transfer set, before and after the bias of class 3 was set."""
    students, threes = results.of("without-3"), results.num_test_by_digit[3]
    corrected = [student.corrections[0] for student in students]
    rows = (
        ("all errors", paper.WITHOUT_3_ERRORS, (_errors(students), _errors(corrected))),
        (f"errors on the {threes:,} threes", paper.WITHOUT_3_ERRORS_ON_3, (_on(3, students), _on(3, corrected))),
    )
    right = [f"{1 - errors / threes:.1%}" for errors in paper.WITHOUT_3_ERRORS_ON_3]
    ours = [f"{1 - _on(3, measured).mean / threes:.1%}" for measured in (students, corrected)]
    bias = summarise([correction.bias[0] for correction in corrected])
    return Table(
        title="3. All 3s left out of the transfer set, temperature 20",
        columns=("", "paper", "paper, bias set", f"ours ({len(students)} seeds)", "ours, bias set"),
        rows=(
            *((name, str(a), str(b), _short(c), _short(d)) for name, (a, b), (c, d) in rows),
            ("3s right, never seen", right[0], right[1], ours[0], f"**{ours[1]}**"),
            ("bias of class 3 raised by", "", f"{paper.WITHOUT_3_BIAS:+.1f}", "", _short(bias, "+.2f")),
        ),
    )


def only_7_8(results: Results) -> Table:
    """Only 7s and 8s in the transfer set, before and after biases were set, in two ways."""
    students = results.of("only-7-8")
    before = summarise([_error_percent(student.errors_by_digit, results) for student in students])
    before_paper, after_paper = paper.ONLY_7_8_ERROR_PERCENT
    lowered = [summarise([student.corrections[0].bias[index] for student in students]) for index in (0, 1)]
    raised = [value for student in students for value in student.corrections[1].bias]
    two, eight = (
        summarise([_error_percent(student.corrections[way].errors_by_digit, results) for student in students])
        for way in (0, 1)
    )
    return Table(
        title="4. Only 7s and 8s in the transfer set, temperature 20",
        columns=("", "paper", f"ours ({len(students)} seeds)", "paper's change of bias", "ours"),
        rows=(
            ("test error", f"{before_paper}%", f"{_short(before)}%", "", ""),
            (
                "with the biases of 7 and 8 set",
                f"{after_paper}%",
                f"**{_short(two)}%**",
                f"{paper.ONLY_7_8_BIAS:+.1f} (both)",
                " and ".join(f"{summary.mean:+.2f}" for summary in lowered),
            ),
            (
                "with the biases of the other eight set",
                "",
                f"{_short(eight)}%",
                "",
                f"{min(raised):+.2f} to {max(raised):+.2f}",
            ),
        ),
    )


def part(results: Results) -> Table:
    """3% of the data: hard labels against soft targets, and hard labels on all data."""
    everything, hard, soft = (
        results.of(name) for name in ("units-800-hard", "part-3-percent-hard", "part-3-percent-soft")
    )
    rows = (
        ("all data, hard labels", paper.SPEECH_ALL_HARD_ACCURACY_PERCENT, everything),
        ("3%, hard labels", paper.SPEECH_3_PERCENT_HARD_ACCURACY_PERCENT, hard),
        ("3%, soft targets", paper.SPEECH_3_PERCENT_SOFT_ACCURACY_PERCENT, soft),
    )
    return Table(
        title="5. Test accuracy from 3% of the data; the paper's figures are for speech",
        columns=("", "paper (speech frames)", "ours (digits)", "test errors", "at the best epoch", "seeds"),
        rows=tuple(
            (
                name,
                f"{accuracy}%",
                f"{100 - summarise([_error_percent(s.errors_by_digit, results) for s in students]).mean:.2f}%",
                _short(_errors(students)),
                _short(summarise([student.lowest_num_errors for student in students])),
                str(len(students)),
            )
            for name, accuracy, students in rows
        ),
    )


def cache(results: Results) -> Table:
    """How far soft targets decoded from the cache are from the teacher's, and what a row takes."""
    figures = results.cache
    row_bytes = figures.num_bytes / figures.num_examples
    columns = (f"{row_bytes:.1f} bytes a row", *(f"temperature {value:g}" for value in figures.temperatures))
    return Table(
        title="The cache",
        columns=columns,
        rows=(
            ("KL(teacher, decoded), mean over all rows, nats", *(f"{value:.1e}" for value in figures.mean_kl)),
            ("largest of all rows", *(f"{value:.1e}" for value in figures.max_kl)),
        ),
    )


TABLES: Mapping[str, Callable[[Results], Table]] = {
    "soft-against-hard": soft_against_hard,
    "temperatures": temperatures,
    "without-3": without_3,
    "only-7-8": only_7_8,
    "part": part,
    "cache": cache,
}
"""All tables, by the names that docs/mnist.md has for them."""


def _errors(measured: Sequence[Student | Correction]) -> Summary:
    return summarise([sum(item.errors_by_digit) for item in measured])


def _on(digit: int, measured: Sequence[Student | Correction]) -> Summary:
    return summarise([item.errors_by_digit[digit] for item in measured])


def _error_percent(errors_by_digit: Sequence[int], results: Results) -> float:
    return 100 * sum(errors_by_digit) / results.num_test


def _count(summaries: Mapping[float, Summary]) -> int:
    return min(summary.count for summary in summaries.values())


def _short(summary: Summary, number_format: str = ".1f") -> str:
    """Write mean and standard deviation over seeds."""
    mean = format(summary.mean, number_format)
    if math.isnan(summary.deviation):
        return mean
    return f"{mean} ± {format(summary.deviation, number_format.removeprefix('+'))}"


def _with_error(summary: Summary) -> str:
    """Write a mean and its standard error."""
    return f"{summary.mean:+.1f} ± {summary.deviation / math.sqrt(summary.count):.1f}"


def _spread(summary: Summary) -> tuple[str, str, str]:
    return _short(summary), f"{summary.low:g} to {summary.high:g}", str(summary.count)
