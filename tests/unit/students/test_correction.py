from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.errors import JobError, TransferSetError
from kdcache.students import BiasCorrection, Evaluation
from kdcache.transfer_set import TransferSet

LABELS = [0, 0, 1, 2, 0, 1, 2, 2]


@pytest.fixture
def transfer_set() -> TransferSet:
    return TransferSet.from_arrays(torch.eye(8), labels=LABELS, example_ids=list("abcdefgh"))


def test_the_frequencies_are_those_of_the_labels(transfer_set):
    correction = BiasCorrection.of(transfer_set, num_classes=3)
    assert correction.frequencies.tolist() == [3 / 8, 2 / 8, 3 / 8]


def test_all_classes_are_corrected_when_all_examples_are_trained_on(transfer_set):
    assert BiasCorrection.of(transfer_set, num_classes=3).classes is None


def test_the_classes_left_out_are_corrected_alone(transfer_set):
    correction = BiasCorrection.of(transfer_set, num_classes=3, trained_on=["a", "b", "c"])
    assert correction.classes == (2,)


def test_frequencies_count_the_examples_left_out_too(transfer_set):
    correction = BiasCorrection.of(transfer_set, num_classes=3, trained_on=["a", "b", "c"])
    assert correction.frequencies.tolist() == [3 / 8, 2 / 8, 3 / 8]


def test_a_subset_with_every_class_is_corrected_in_all_classes(transfer_set):
    assert BiasCorrection.of(transfer_set, num_classes=3, trained_on=["a", "c", "d"]).classes is None


def test_the_bias_matches_on_all_inputs_of_the_transfer_set(transfer_set):
    torch.manual_seed(0)
    student = nn.Linear(8, 3)
    bias = BiasCorrection.of(transfer_set, num_classes=3).bias_of(student)
    mass = torch.softmax(student(torch.eye(8)).detach() + bias, dim=1).mean(dim=0)
    torch.testing.assert_close(mass, torch.tensor([3 / 8, 2 / 8, 3 / 8]), rtol=0, atol=1e-5)


def test_dropout_plays_no_part(transfer_set):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.9)).train()
    correction = BiasCorrection.of(transfer_set, num_classes=3)
    assert torch.equal(correction.bias_of(student), correction.bias_of(student.train()))


def test_scores_are_taken_with_the_bias_added(transfer_set):
    student = nn.Linear(8, 3)
    nn.init.zeros_(student.weight)
    nn.init.zeros_(student.bias)
    evaluation = Evaluation(torch.eye(8), torch.tensor(LABELS))
    scores = BiasCorrection.of(transfer_set, num_classes=3).score(student, torch.tensor([0.0, 1.0, 0.0]), evaluation)
    assert scores.num_errors == 6


def test_labels_are_needed():
    without = TransferSet.from_arrays(torch.eye(8))
    with pytest.raises(JobError, match="takes the classes' frequencies from the transfer set's labels"):
        BiasCorrection.of(without, num_classes=3)


def test_one_label_a_row_is_needed():
    sequences = TransferSet.from_arrays(torch.eye(8), labels=LABELS, num_rows=[2] * 8)
    with pytest.raises(JobError, match="one label a row"):
        BiasCorrection.of(sequences, num_classes=3)


def test_a_class_without_examples_is_refused(transfer_set):
    with pytest.raises(TransferSetError, match=r"of 4 classes, \[3\] have no example"):
        BiasCorrection.of(transfer_set, num_classes=4)


def test_a_label_beyond_the_classes_is_refused(transfer_set):
    with pytest.raises(TransferSetError, match="the largest label is 2"):
        BiasCorrection.of(transfer_set, num_classes=2)
