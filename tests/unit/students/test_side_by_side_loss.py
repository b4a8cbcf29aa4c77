from __future__ import annotations

import dataclasses

import pytest
import torch

import kdcache
from kdcache.codecs import Decoder, codec_for, parameters_to
from kdcache.errors import MergedCacheError, OptionError, ShapeError
from kdcache.students import line_up
from kdcache.students.loss import SideBySideLoss

DIVERGENCES = ["forward-kl", "cross-entropy", "reverse-kl", "jensen-shannon", "logit-matching"]
MEANS = ["geometric", "arithmetic", "tempered-arithmetic"]


@pytest.fixture
def students(make_sweep):
    return line_up(make_sweep(temperatures=(4.0, 1.0, 2.5), soft_weights=(0.0, 0.7, 1.0), seeds=(0, 1)))


@pytest.fixture
def logits(students):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(students), 16, 3, generator=generator).mul(3).requires_grad_()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mean", MEANS)
def test_each_student_has_the_loss_it_would_have_alone(students, logits, batch, divergence, mean):
    _, labels, soft_targets = batch
    loss = SideBySideLoss(students, divergence=divergence, mean=mean)
    alone = [
        kdcache.distillation_loss(
            logits[index],
            soft_targets,
            labels,
            temperature=student.temperature or 1.0,
            soft_weight=student.soft_weight,
            divergence=divergence,
            mean=mean,
        )
        for index, student in enumerate(students)
    ]
    torch.testing.assert_close(loss(logits, soft_targets, labels).total, torch.stack(alone))


def test_each_student_has_the_gradient_it_would_have_alone(students, logits, batch):
    _, labels, soft_targets = batch
    (together,) = torch.autograd.grad(SideBySideLoss(students)(logits, soft_targets, labels).total.sum(), logits)
    own = kdcache.distillation_loss(logits[3], soft_targets, labels, temperature=4.0, soft_weight=0.7)
    assert (students[3].temperature, students[3].soft_weight) == (4.0, 0.7)
    torch.testing.assert_close(together[3], torch.autograd.grad(own, logits)[0][3])


def test_the_total_is_the_weighted_sum_of_its_terms(students, logits, batch):
    _, labels, soft_targets = batch
    parts = SideBySideLoss(students)(logits, soft_targets, labels)
    torch.testing.assert_close(parts.total[3], 0.7 * parts.soft[3] + 0.3 * parts.hard[3])


def test_a_term_that_a_student_does_not_have_is_nan(make_sweep, logits, batch):
    _, labels, soft_targets = batch
    students = line_up(make_sweep(soft_weights=(0.0, 1.0)))
    parts = SideBySideLoss(students)(logits[:2], soft_targets, labels)
    assert torch.stack([parts.soft, parts.hard]).isnan().tolist() == [[True, False], [False, True]]


def test_hard_baselines_alone_decode_no_soft_targets(make_sweep, logits, batch):
    _, labels, soft_targets = batch
    of_other_rows = soft_targets[:3]
    loss = SideBySideLoss(line_up(make_sweep(soft_weights=(0.0,))))
    parts = loss(logits[:1], of_other_rows, labels)
    torch.testing.assert_close(parts.total[0], torch.nn.functional.cross_entropy(logits[0], labels))


def test_soft_students_alone_need_no_labels(make_sweep, logits, batch):
    _, _, soft_targets = batch
    loss = SideBySideLoss(line_up(make_sweep(soft_weights=(1.0,))))
    expected = kdcache.distillation_loss(logits[0], soft_targets, temperature=4.0, soft_weight=1.0)
    torch.testing.assert_close(loss(logits[:1], soft_targets, None).total[0], expected)


def test_one_diverged_student_spoils_no_other(students, logits, batch):
    _, labels, soft_targets = batch
    spoilt = logits.detach().clone()
    spoilt[2] = torch.nan
    total = SideBySideLoss(students)(spoilt, soft_targets, labels).total
    assert total.isnan().nonzero().flatten().tolist() == [2]


def test_positions_count_as_rows(students, logits, batch):
    _, labels, soft_targets = batch
    loss = SideBySideLoss(students)
    by_position = logits.view(len(students), 4, 4, 3)
    expected = loss(logits, soft_targets, labels).total
    torch.testing.assert_close(loss(by_position, soft_targets, labels.view(4, 4)).total, expected)


def test_missing_labels_are_refused(students, logits, batch):
    _, _, soft_targets = batch
    with pytest.raises(ShapeError, match=r"needs labels, and this transfer set has none; give soft_weights = \[1\.0\]"):
        SideBySideLoss(students)(logits, soft_targets, None)


def test_labels_of_other_rows_are_refused(students, logits, batch):
    _, labels, soft_targets = batch
    with pytest.raises(ShapeError, match="3 labels for 16 rows"):
        SideBySideLoss(students)(logits, soft_targets, labels[:3])


@pytest.mark.parametrize(("label", "found"), [(3, "from 0 to 3"), (-100, "from -100 to 2")])
def test_a_label_that_is_no_class_is_refused(students, logits, batch, label, found):
    _, labels, soft_targets = batch
    labels = torch.arange(16) % 3
    labels[5] = label
    with pytest.raises(ShapeError, match=f"labels range {found}; the students' classes from 0 to 2"):
        SideBySideLoss(students)(logits, soft_targets, labels)


def test_students_of_other_rows_are_refused(students, logits, batch):
    _, labels, soft_targets = batch
    with pytest.raises(ShapeError, match=r"students give 15 rows of 3 classes, the soft targets are 16 rows"):
        SideBySideLoss(students)(logits[:, 1:], soft_targets, labels)


def test_students_of_other_classes_are_refused(students, batch):
    _, labels, soft_targets = batch
    with pytest.raises(ShapeError, match=r"students give 16 rows of 4 classes, the soft targets are 16 rows of 3"):
        SideBySideLoss(students)(torch.zeros(len(students), 16, 4), soft_targets, labels)


def test_a_merged_cache_gives_no_arithmetic_mean(students, logits, batch):
    _, labels, soft_targets = batch
    merged = dataclasses.replace(
        soft_targets, codes=soft_targets.codes[:1], decoders=soft_targets.decoders[:1], merge="geometric"
    )
    with pytest.raises(MergedCacheError, match="keeps their geometric mean only"):
        SideBySideLoss(students, mean="arithmetic")(logits, merged, labels)


def in_topk(**options):
    """A batch of 16 rows, three classes and two teachers."""
    codec = codec_for(kdcache.TopK(k=1, **options), 3)
    rows = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(4)) * 3
    decoders = [Decoder(codec, parameters_to(codec.fit(logits), "cpu")) for logits in rows]
    codes = [codec.encode(logits, decoder.parameters) for logits, decoder in zip(rows, decoders, strict=True)]
    return kdcache.SoftTargets(tuple(codes), tuple(decoders), ("a", "b"))


@pytest.mark.parametrize(
    ("options", "divergence", "mean"),
    [({}, divergence, mean) for divergence in DIVERGENCES for mean in MEANS]
    + [({"tail": "samples", "num_samples": 1}, divergence, "arithmetic") for divergence in DIVERGENCES[:2]],
)
def test_each_student_of_topk_has_the_loss_it_would_have_alone(students, logits, options, divergence, mean):
    soft_targets, labels = in_topk(**options), torch.arange(16) % 3
    loss = SideBySideLoss(students, divergence=divergence, mean=mean)
    alone = [
        kdcache.distillation_loss(
            logits[index],
            soft_targets,
            labels,
            temperature=student.temperature or 1.0,
            soft_weight=student.soft_weight,
            divergence=divergence,
            mean=mean,
        )
        for index, student in enumerate(students)
    ]
    torch.testing.assert_close(loss(logits, soft_targets, labels).total, torch.stack(alone))


@pytest.mark.parametrize(
    ("divergence", "mean"),
    [
        ("logit-matching", "arithmetic"),
        ("reverse-kl", "arithmetic"),
        ("jensen-shannon", "arithmetic"),
        ("forward-kl", "geometric"),
    ],
)
def test_sampled_soft_targets_are_refused_where_they_would_be_biased(students, logits, divergence, mean):
    loss = SideBySideLoss(students, divergence=divergence, mean=mean)
    with pytest.raises(OptionError, match="hese soft targets are sampled"):
        loss(logits, in_topk(tail="samples"), torch.arange(16) % 3)
