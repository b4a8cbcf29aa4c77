"""The committed page says what the committed results say, and the tables what hand-made results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.mnist.page import fill, write_pictures
from jobs.mnist.results import Results
from jobs.mnist.steps import JOB_FILE
from jobs.mnist.tables import TABLES, Table, as_markdown, as_rich
from kdcache.errors import JobError
from kdcache.jobs import read_job, resolve
from kdcache.students import line_up

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.read(DOCS / "results" / "mnist.json")


def test_the_page_holds_the_tables_of_the_results(results) -> None:
    page = (DOCS / "mnist.md").read_text(encoding="utf-8")
    assert fill(page, results) == page


def test_the_results_are_those_of_the_job_file(results) -> None:
    sweeps = read_job(JOB_FILE).job.students
    expected = [(sweep.name, item.temperature, item.seed, sweep.epochs) for sweep in sweeps for item in line_up(sweep)]
    assert [(item.sweep, item.temperature, item.seed, item.num_epochs) for item in results.students] == expected


def test_results_come_back_as_they_were_written(results, tmp_path) -> None:
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_missing_results_name_the_command_that_makes_them(tmp_path) -> None:
    with pytest.raises(JobError, match=r"python -m jobs\.mnist"):
        Results.read(tmp_path / "results.json")


def test_a_sweep_that_was_not_trained_is_named(results) -> None:
    with pytest.raises(JobError, match="no student of sweep 'other'"):
        results.of("other")


def test_a_page_without_one_of_the_tables_is_refused(results) -> None:
    with pytest.raises(JobError, match="the page has the tables"):
        fill("<!-- table cache -->\n<!-- end -->\n", results)


def test_what_stands_between_markers_is_made_anew_and_the_rest_is_kept(results) -> None:
    blocks = "".join(f"Above.\n<!-- table {name} -->\nold\n<!-- end -->\nBelow.\n" for name in TABLES)
    filled = fill(blocks, results)
    assert (filled.count("old"), filled.count("Above."), filled.count("Below.")) == (0, len(TABLES), len(TABLES))


def test_a_table_is_written_as_markdown() -> None:
    table = Table(title="Errors", columns=("", "ours"), rows=(("hard", "1"), ("soft", "**2**")))
    assert as_markdown(table) == "|  | ours |\n| --- | ---: |\n| hard | 1 |\n| soft | **2** |"


def test_a_table_can_be_shown_in_a_terminal() -> None:
    table = as_rich(Table(title="Errors", columns=("", "ours"), rows=(("soft", "**2**"),)))
    assert [list(column.cells) for column in table.columns] == [["soft"], ["[bold]2[/bold]"]]


def test_pictures_of_the_results_can_be_drawn(results, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert {path.name for path in write_pictures(tmp_path, results)} == {
        f"mnist-temperature-{units}-units.{kind}" for units in (30, 300) for kind in ("png", "svg")
    }


def test_every_factory_of_the_job_exists() -> None:
    loaded = read_job(JOB_FILE)
    job = loaded.job
    subsets = [sweep.subset for sweep in job.students if sweep.subset is not None]
    factories = [job.transfer_set, job.evaluation, *job.teachers, *job.students, *subsets]
    assert all(callable(resolve(factory.factory, loaded.folder)) for factory in factories)
