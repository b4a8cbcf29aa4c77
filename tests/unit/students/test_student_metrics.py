from __future__ import annotations

import math

import pytest

from kdcache.students.metrics import MetricsFile


@pytest.fixture
def file(tmp_path) -> MetricsFile:
    return MetricsFile(tmp_path / "run" / "metrics.jsonl")


def test_lines_are_read_as_they_were_written(file):
    file.append([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    assert file.lines() == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]


def test_lines_are_added_to_those_there(file):
    file.append([{"epoch": 1}])
    file.append([{"epoch": 2}])
    assert file.lines() == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_becomes_null(file, value):
    file.append([{"epoch": 1, "loss": value}])
    assert file.lines() == [{"epoch": 1, "loss": None}]


def test_a_file_that_does_not_exist_has_no_lines(file):
    assert file.lines() == []


def test_later_epochs_can_be_dropped(file):
    file.append([{"epoch": 1}, {"epoch": 2}, {"epoch": 3}])
    file.keep_epochs(2)
    assert file.lines() == [{"epoch": 1}, {"epoch": 2}]


def test_a_line_cut_short_is_dropped_with_them(file):
    file.append([{"epoch": 1}])
    with file.path.open("a") as opened:
        opened.write('{"epoch": 2, "lo')
    file.keep_epochs(2)
    assert file.path.read_text() == '{"epoch": 1}\n'


def test_dropping_from_a_file_that_does_not_exist_makes_none(file):
    file.keep_epochs(1)
    assert not file.path.exists()
