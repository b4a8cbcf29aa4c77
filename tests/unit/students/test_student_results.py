from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from kdcache.errors import JobError
from kdcache.students import Scores, StudentResult, StudentSettings
from kdcache.students.results import ResultsFile, write_weights


@pytest.fixture
def file(tmp_path) -> ResultsFile:
    return ResultsFile(tmp_path / "results.json")


@pytest.fixture
def result(tmp_path) -> StudentResult:
    weights = tmp_path / "t4-w0.9-s0.safetensors"
    write_weights(weights, nn.Linear(2, 2), {"kdcache.student": "t4-w0.9-s0"})
    return StudentResult(
        sweep="small",
        student_index=0,
        settings=StudentSettings(temperature=4.0, soft_weight=0.9, seed=0),
        weights=weights,
        num_epochs=3,
        train_loss=0.5,
        test=Scores(num_errors=3, num_rows=10, cross_entropy=0.7),
        bias=(0.25, -0.25),
        corrected_test=Scores(num_errors=2, num_rows=10, cross_entropy=0.6),
    )


def test_results_are_read_as_they_were_written(file, result):
    file.write({"sweep": "small"}, [result])
    assert file.read() == ({"sweep": "small"}, [result])


def test_a_result_without_test_and_bias_is_read_as_it_was_written(file, result):
    bare = StudentResult(
        sweep="small",
        student_index=0,
        settings=StudentSettings(temperature=None, soft_weight=0.0, seed=0),
        weights=result.weights,
        num_epochs=3,
        train_loss=None,
    )
    file.write({}, [bare])
    assert file.read() == ({}, [bare])


def test_a_folder_with_results_can_be_moved(file, result, tmp_path):
    file.write({}, [result])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (file.path, result.weights):
        path.rename(moved / path.name)
    _, (found,) = ResultsFile(moved / "results.json").read()
    assert found.weights == moved / "t4-w0.9-s0.safetensors"


def test_there_are_none_before_the_end(file):
    assert file.read() is None


def test_results_without_their_weights_are_refused(file, result):
    file.write({}, [result])
    result.weights.unlink()
    with pytest.raises(JobError, match=r"weights are missing: .*t4-w0\.9-s0\.safetensors"):
        file.read()


def test_results_of_another_version_are_refused(file, result):
    file.write({}, [result])
    document = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({**document, "format_version": 99}))
    with pytest.raises(JobError, match="format version 99"):
        file.read()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"students": [{}], "identity": {}, "format_version": 1}'])
def test_a_file_that_holds_no_results_is_refused(file, text):
    file.path.write_text(text)
    with pytest.raises(JobError, match="is no results file"):
        file.read()


def test_error_and_accuracy_are_shares_of_the_rows():
    scores = Scores(num_errors=3, num_rows=10, cross_entropy=0.7)
    assert (scores.error, scores.accuracy) == (0.3, 0.7)


def test_the_weights_say_whose_they_are(result):
    with safetensors.safe_open(result.weights, framework="pt") as opened:
        assert opened.metadata() == {"kdcache.student": "t4-w0.9-s0"}


def test_weights_that_share_memory_are_written_under_every_name(tmp_path):
    module = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "second": nn.Linear(2, 2, bias=False)})
    module["second"].weight = module["first"].weight
    path = Path(tmp_path / "tied.safetensors")
    write_weights(path, module, {})
    loaded = safetensors.torch.load_file(path)
    assert torch.equal(loaded["first.weight"], loaded["second.weight"])
