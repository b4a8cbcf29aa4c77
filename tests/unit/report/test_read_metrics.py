from __future__ import annotations

import json

import pytest

from kdcache.errors import JobError
from kdcache.report import read_metrics


@pytest.fixture
def folder(tmp_path):
    for name in ("b", "a"):
        file = tmp_path / "students" / name / "metrics.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"sweep": name, "epoch": 1}) + "\n" + json.dumps({"sweep": name, "epoch": 2}) + "\n")
    return tmp_path


def test_a_file_is_read_line_by_line(folder):
    lines = read_metrics(folder / "students" / "a" / "metrics.jsonl")
    assert lines == [{"sweep": "a", "epoch": 1}, {"sweep": "a", "epoch": 2}]


def test_a_folder_is_read_file_by_file_in_the_order_of_their_paths(folder):
    assert [line["sweep"] for line in read_metrics(folder)] == ["a", "a", "b", "b"]


def test_a_line_cut_short_is_passed_over(folder):
    file = folder / "students" / "a" / "metrics.jsonl"
    with file.open("a") as opened:
        opened.write('{"sweep": "a", "ep')
    assert len(read_metrics(file)) == 2


@pytest.mark.parametrize("name", ["", "metrics.jsonl"])
def test_missing_metrics_are_a_job_error(tmp_path, name):
    with pytest.raises(JobError, match="there are no metrics at"):
        read_metrics(tmp_path / name)
