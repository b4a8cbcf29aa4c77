"""Which positions of a padded batch meet which cached rows."""

from __future__ import annotations

import pytest
import torch

from kdcache.codecs import Decoder, codec_for
from kdcache.documents import Lossless
from kdcache.errors import ShapeError
from kdcache.losses import DistillationLoss
from kdcache.soft_targets import SoftTargets
from kdcache.students.positions import cached_rows

NUM_CLASSES = 3
IDS = ["one", "two", "three"]
MATCH = DistillationLoss(temperature=1.0, soft_weight=1.0, divergence="logit-matching", reduction="sum")
"""0 exactly where every row meets its own."""


def soft_targets_of(num_rows, *, rows=None):
    count = sum(num_rows)
    codes = rows_of(count) if rows is None else rows
    decoder = Decoder(codec_for(Lossless(), num_classes=NUM_CLASSES), {})
    return SoftTargets((codes,), (decoder,), ("a",), num_rows=torch.tensor(num_rows))


def rows_of(count):
    return torch.arange(count * NUM_CLASSES, dtype=torch.float32).reshape(count, NUM_CLASSES) ** 1.5


def placed(num_rows, places, *, num_positions, num_examples=3):
    """Student logits that are the cached rows at their places, and far off everywhere else."""
    logits = torch.full((num_examples, num_positions, NUM_CLASSES), 1e6) * torch.rand(NUM_CLASSES)
    for row, (example, position) in zip(rows_of(sum(num_rows)), places, strict=True):
        logits[example, position] = row
    return logits


def located(num_rows, *, mask=None, labelled=None, labels_are_ahead=False):
    return cached_rows(
        soft_targets_of(num_rows),
        attention_mask=None if mask is None else torch.tensor(mask),
        labelled=None if labelled is None else torch.tensor(labelled, dtype=torch.bool),
        labels_are_ahead=labels_are_ahead,
        ids=IDS,
        where="batch 1",
    )


FIRST = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
LAST = [(0, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        (None, FIRST),
        ([[1, 1, 0], [1, 0, 0], [1, 1, 1]], FIRST),
        ([[0, 1, 1], [0, 0, 1], [1, 1, 1]], LAST),
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1]], FIRST),
        ([[0, 1, 1], [0, 1, 1], [1, 1, 1]], [(0, 1), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2)]),
    ],
    ids=["no mask", "right", "left", "more tokens than rows", "left, and more tokens than rows"],
)
def test_rows_meet_the_positions_of_their_tokens(mask, places):
    rows = located([2, 1, 3], mask=mask)
    assert rows.total(placed([2, 1, 3], places, num_positions=3), MATCH) == 0


def test_every_row_counts_where_nothing_is_left_out():
    assert located([2, 1, 3]).num_counted == 6


@pytest.mark.parametrize("mask", [None, [[0, 1, 1], [0, 0, 1], [1, 1, 1]]], ids=["right", "left"])
def test_rows_without_a_label_are_left_out(mask):
    labelled = [[0, 1, 1], [0, 0, 0], [0, 0, 1]]
    rows = located([2, 1, 3], mask=mask, labelled=labelled)
    all_rows = located([2, 1, 3], mask=mask)
    logits = torch.randn(3, 3, NUM_CLASSES)
    assert rows.total(logits, MATCH) < all_rows.total(logits, MATCH)


@pytest.mark.parametrize(
    ("mask", "labels_are_ahead", "counted"),
    [
        (None, False, [False, True, False, False, False, True]),
        (None, True, [True, True, False, False, True, False]),
        ([[0, 1, 1], [0, 0, 1], [1, 1, 1]], False, [True, True, False, False, False, True]),
        ([[0, 1, 1], [0, 0, 1], [1, 1, 1]], True, [True, False, False, False, True, False]),
    ],
    ids=["right", "right, causal", "left", "left, causal"],
)
def test_a_rows_label_stands_at_its_position_or_one_ahead(mask, labels_are_ahead, counted):
    labelled = [[0, 1, 1], [0, 0, 0], [0, 0, 1]]
    rows = located([2, 1, 3], mask=mask, labelled=labelled, labels_are_ahead=labels_are_ahead)
    assert rows.counted.tolist() == counted
    assert rows.num_counted == sum(counted)


def test_a_mask_of_another_shape_says_nothing_of_padding():
    rows = located([2, 1, 3], mask=[[[[1]]]])
    assert rows.total(placed([2, 1, 3], FIRST, num_positions=3), MATCH) == 0


def test_fewer_tokens_than_cached_rows_are_refused():
    with pytest.raises(
        ShapeError, match=r"batch 1: example 'two' has 1 tokens, and 2 rows in the cache.*cut no shorter"
    ):
        located([1, 2, 1], mask=[[1, 1], [1, 0], [1, 1]])


def test_a_mask_of_other_examples_is_refused():
    with pytest.raises(ShapeError, match="its attention_mask is of 2 examples, the ids are 3"):
        located([1, 2, 1], mask=[[1, 1], [1, 1]])


def test_labels_of_examples_cannot_leave_out_rows_of_sequences():
    with pytest.raises(ShapeError, match="its labels have 1 axes"):
        located([1, 2, 1], labelled=[1, 1, 1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, NUM_CLASSES), r"must be \[example, position, class\]"),
        ((3, 2, NUM_CLASSES), "the student gives 2 positions"),
    ],
)
def test_logits_of_another_shape_are_refused(shape, message):
    rows = located([2, 1, 3], labelled=[[1, 1, 1]] * 3)
    with pytest.raises(ShapeError, match=message):
        rows.total(torch.zeros(shape), MATCH)
