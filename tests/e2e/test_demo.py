"""The demo runs from end to end, goes on where it was stopped, and admits an effect that is missing."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import typer
from typer.testing import CliRunner

from jobs.demo import __main__ as demo
from jobs.demo.train_teachers import JOB, Recipe, train_teachers
from kdcache.cli import app
from kdcache.jobs import read_job
from kdcache.students import train_job

SMALLER = ((r"epochs = 60", "epochs = 1"), (r"seeds = \[.*\]", "seeds = [0]"), (r".*teacher-[2-9].*\n", ""))


@pytest.fixture(scope="module")
def small_job(tmp_path_factory):
    """The demo's own job with two teachers, one seed and one epoch, run to its end once."""
    path = tmp_path_factory.mktemp("demo") / "job.toml"
    text = JOB.read_text()
    for pattern, smaller in SMALLER:
        text = re.sub(pattern, smaller, text)
    path.write_text(text)
    demo.run(read_job(path), Recipe(num_epochs=1))
    return path


@pytest.fixture
def job(small_job, tmp_path):
    """A copy of the finished run, to be spoilt."""
    shutil.copytree(small_job.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "job.toml"


def stamps(out):
    """When each file was written, but for the pictures, which are drawn in every run."""
    files = (path for path in out.rglob("*") if path.is_file() and path.stem != "demo")
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_the_outcome_has_teachers_and_all_kinds_of_students(small_job):
    rows = demo.run(read_job(small_job), Recipe(num_epochs=1)).rows
    assert [(row.group, len(row.errors)) for row in rows] == [
        ("teachers", 2),
        *[("teachers", 1)] * 2,
        *[("all examples", 1)] * 6,
        *[("100 examples", 3)] * 4,
        *[("all but 3s", 1)] * 4,
    ]


def test_a_picture_is_drawn(small_job):
    assert (small_job.parent / "out/demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_writes_nothing_but_the_picture(small_job):
    before = stamps(small_job.parent / "out")
    demo.run(read_job(small_job), Recipe(num_epochs=1))
    assert stamps(small_job.parent / "out") == before


def test_a_fresh_run_writes_everything_anew(job):
    before = stamps(job.parent / "out")
    with pytest.raises(typer.Exit):
        demo.main(fresh=True, job=job, teacher_epochs=0)
    assert not before.items() & stamps(job.parent / "out").items()


def test_teachers_that_know_nothing_show_no_effect_and_the_demo_says_so(job, capsys):
    with pytest.raises(typer.Exit) as exit_:
        demo.main(fresh=True, job=job, teacher_epochs=0)
    assert exit_.value.exit_code == 1
    assert "DOES NOT HOLD: soft targets beat hard labels on few examples" in capsys.readouterr().out


def test_json_holds_rows_effects_and_the_caches_cost(job, capsys):
    with pytest.raises(typer.Exit):
        demo.main(fresh=True, as_json=True, job=job, teacher_epochs=0)
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"rows", "effects", "cache", "picture", "seconds", "cpu_seconds"}
    assert not all(effect["holds"] for effect in printed["effects"])
    assert 0 < printed["cache"]["bytes_per_row"] < 40


def test_a_cache_of_other_teachers_is_refused_and_kept(job, capsys):
    before = (job.parent / "out/cache/complete.json").read_bytes()
    with pytest.raises(typer.Exit) as exit_:
        demo.main(job=job, teacher_epochs=2)
    assert exit_.value.exit_code == 2
    assert "PlanMismatchError" in capsys.readouterr().err
    assert (job.parent / "out/cache/complete.json").read_bytes() == before


def test_students_are_trained_when_the_teachers_are_gone(job):
    shutil.rmtree(job.parent / "out/teachers")
    shutil.rmtree(job.parent / "out/students")
    results = train_job(read_job(job), out=job.parent / "out", only=["100-examples-0"])
    assert len(results) == 4


def test_the_single_commands_make_what_the_demo_makes(small_job, job):
    shutil.rmtree(job.parent / "out")
    train_teachers(read_job(job), Recipe(num_epochs=1))
    for command in ("plan", "build", "info", "train"):
        assert CliRunner().invoke(app, [command, str(job)], catch_exceptions=False).exit_code == 0
    for name in ("cache/complete.json", "students/all-but-3s/results.json"):
        assert (job.parent / "out" / name).read_bytes() == (small_job.parent / "out" / name).read_bytes()


@pytest.mark.slow
def test_the_demo_shows_every_effect(tmp_path):
    shutil.copy(JOB, tmp_path)
    effects = demo.run(read_job(tmp_path / "job.toml"), Recipe()).effects
    assert [effect.holds for effect in effects] == [True] * 5
