from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.errors import JobError, ShapeError
from kdcache.students import Evaluation
from kdcache.students.evaluation import as_evaluation, evaluate, score
from kdcache.students.side_by_side import LoopedStudents, StackedStudents


def choosing(chosen: int) -> nn.Module:
    """A student that always chooses one class, with logit 2 over 0."""
    student = nn.Linear(2, 3)
    nn.init.zeros_(student.weight)
    with torch.no_grad():
        student.bias.copy_(2.0 * nn.functional.one_hot(torch.tensor(chosen), 3))
    return student


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(torch.zeros(5, 2), torch.tensor([0, 0, 0, 1, 2]))


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_each_student_is_scored(kind, evaluation):
    scores = evaluate(kind([choosing(0), choosing(1)]), evaluation)
    assert [(one.num_errors, one.num_rows) for one in scores] == [(2, 5), (4, 5)]


def test_the_cross_entropy_is_the_mean_over_rows(evaluation):
    (scores,) = evaluate(LoopedStudents([choosing(0)]), evaluation)
    log_normaliser = np.log(np.exp(2) + 2)
    assert scores.cross_entropy == pytest.approx(log_normaliser - 3 * 2 / 5)


def test_evaluation_is_without_dropout():
    student = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9))
    evaluation = Evaluation(torch.ones(50, 2), torch.zeros(50, dtype=torch.int64))
    (scores,) = evaluate(LoopedStudents([student]), evaluation)
    assert scores.num_errors in {0, 50}


def test_one_students_logits_are_scored():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert score(logits, torch.tensor([0, 0])).num_errors == 1


def test_every_position_is_a_row():
    student = nn.Unflatten(1, (4, 3))
    evaluation = Evaluation(torch.eye(12)[:2], torch.zeros(2, 4, dtype=torch.int64))
    (scores,) = evaluate(LoopedStudents([student]), evaluation)
    assert scores.num_rows == 8


def test_other_rows_of_logits_than_labels_are_refused():
    evaluation = Evaluation(torch.eye(12)[:2], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeError, match="8 rows of logits for 2 labels"):
        evaluate(LoopedStudents([nn.Unflatten(1, (4, 3))]), evaluation)


def test_a_cross_entropy_that_is_not_finite_is_none():
    assert score(torch.full((2, 3), torch.nan), torch.tensor([0, 1])).cross_entropy is None


def test_arrays_become_an_evaluation():
    evaluation = as_evaluation((np.zeros((2, 3), np.float32), np.array([0, 1], np.uint8)))
    assert (evaluation.inputs.shape, evaluation.labels.dtype) == ((2, 3), torch.int64)


def test_a_list_of_labels_will_do():
    assert as_evaluation([torch.zeros(2, 3), [0, 1]]).labels.tolist() == [0, 1]


def test_an_evaluation_stays_as_it_is(evaluation):
    assert as_evaluation(evaluation) is evaluation


@pytest.mark.parametrize("value", [None, 3, (1, 2, 3), "ab c"])
def test_what_is_no_pair_is_refused(value):
    with pytest.raises(JobError, match=r"expected a pair \(inputs, labels\)"):
        as_evaluation(value)


@pytest.mark.parametrize("labels", [[0.5, 1.0], [True, False]])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(JobError, match="must be class indices"):
        as_evaluation((torch.zeros(2, 3), labels))


def test_inputs_that_are_no_numbers_are_refused():
    with pytest.raises(JobError, match="must be arrays or tensors"):
        as_evaluation((["a", "b"], [0, 1]))


@pytest.mark.parametrize("labels", [[0], []])
def test_as_many_labels_as_inputs_are_needed(labels):
    with pytest.raises(ShapeError, match=r"2 inputs and \d labels"):
        as_evaluation((torch.zeros(2, 3), torch.tensor(labels, dtype=torch.int64)))
