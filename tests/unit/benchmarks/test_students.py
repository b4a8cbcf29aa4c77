"""The students benchmark: inputs that belong to their rows, gradients, pairs, scores, tables, on a made-up teacher."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.students import pairs, report, runner, scores
from benchmarks.students.arms import FULL, FullLogits, open_arms
from benchmarks.students.image import ConvolutionalNetwork
from benchmarks.students.lm import PADDING, LanguageModel, contexts, following
from benchmarks.students.subjects import Plan, Subject
from benchmarks.students.training import batches, soft_gradient, train
from benchmarks.teachers import smollm2
from kdcache.losses import soft_cross_entropy

NUM_CLASSES = 200
PLAN = Plan(num_train=600, num_held_out=300, steps=100, learning_rate=0.03, seeds=2, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def subject():
    """A teacher that is a linear layer over what the student sees, with noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 8, generator=generator)
    logits = inputs @ torch.randn(8, NUM_CLASSES, generator=generator)
    logits += 0.5 * torch.randn(900, NUM_CLASSES, generator=generator)
    return Subject(
        name="lm", title="made up, 200 classes", train_inputs=inputs[:600], held_out_inputs=inputs[600:],
        train_logits=logits[:600], held_out_logits=logits[600:], held_out_labels=logits[600:].argmax(1),
        student=lambda: nn.Linear(8, NUM_CLASSES),
    )  # fmt: skip


@pytest.fixture(scope="module")
def arms(subject, tmp_path_factory):
    return list(open_arms(subject, PLAN.temperatures, tmp_path_factory.mktemp("arms")))


def test_a_context_ends_at_its_own_token_and_never_leaves_its_window():
    windows = torch.arange(1, 13).view(2, 6)
    assert contexts(windows, length=3)[1].tolist() == [
        [PADDING, PADDING, 7], [PADDING, 7, 8], [7, 8, 9], [8, 9, 10], [9, 10, 11], [10, 11, 12],
    ]  # fmt: skip


def test_labels_are_the_tokens_that_follow_in_the_text_also_at_a_windows_end():
    text = torch.arange(100, 120)
    cut = smollm2.windows(text, num_windows=3, window=4)
    assert following(text, cut).tolist() == [[*range(101, 105)], [*range(109, 113)], [117, 118, 119, -1]]


def test_windows_of_another_text_are_refused():
    text = torch.arange(20)
    with pytest.raises(ValueError, match="not cut from this text; record both again"):
        following(text, smollm2.windows(text, num_windows=3, window=4) + 1)


def test_a_language_model_looks_at_the_order_of_its_tokens():
    torch.manual_seed(0)
    student = LanguageModel(NUM_CLASSES, context_tokens=3)
    logits = student(torch.tensor([[1, 2, 3], [2, 1, 3]]))
    assert logits.shape == (2, NUM_CLASSES)
    assert not torch.allclose(logits[0], logits[1])


def test_an_image_student_gives_a_logit_a_class():
    assert ConvolutionalNetwork(NUM_CLASSES)(torch.zeros(2, 3, 32, 32)).shape == (2, NUM_CLASSES)


@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_the_gradient_is_that_of_the_librarys_loss(mass):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(13, 40_000, generator=generator).requires_grad_()
    soft_targets = mass * torch.randn(13, 40_000, generator=generator).softmax(1)
    loss = 9 * soft_cross_entropy((logits / 3).log_softmax(1), soft_targets.log()).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(soft_gradient(logits.detach(), soft_targets, 3.0), expected, rtol=1e-4, atol=1e-9)


def test_every_row_is_seen_once_before_any_comes_again():
    seen = torch.cat(list(batches(10, 4, steps=5, seed=0)))
    assert [sorted(seen[:10].tolist()), sorted(seen[10:].tolist())] == [[*range(10)], [*range(10)]]


def test_students_of_one_seed_are_equal_whatever_was_drawn_before(subject):
    soft_targets = subject.train_logits.softmax(1)
    students = []
    for before in (0, 5):
        torch.rand(before)
        students.append(train(subject, soft_targets, 1.0, PLAN, seed=3))
    torch.testing.assert_close(students[0].weight, students[1].weight, rtol=0, atol=0)


def test_students_of_two_seeds_begin_with_other_weights(subject):
    plan = replace(PLAN, learning_rate=0.0)
    first, second = (train(subject, subject.train_logits.softmax(1), 1.0, plan, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_comes_nearer_to_its_teacher(subject, temperature):
    soft_targets = (subject.train_logits / temperature).softmax(1)
    untrained = train(subject, soft_targets, temperature, replace(PLAN, learning_rate=0.0), seed=0)
    trained = train(subject, soft_targets, temperature, PLAN, seed=0)
    before, after = (scores.score(one, subject, temperature) for one in (untrained, trained))
    assert after.kl_at_temperature < 0.2 * before.kl_at_temperature
    assert after.agreement > before.agreement


class Teacher(nn.Module):
    """Gives its inputs as logits."""

    def forward(self, inputs):
        return inputs


def scored(own, teachers, labels, temperature=1.0):
    subject = Subject(
        name="image", title="made up", train_inputs=own, held_out_inputs=own, train_logits=teachers,
        held_out_logits=teachers, held_out_labels=labels, student=Teacher,
    )  # fmt: skip
    return scores.score(Teacher(), subject, temperature)


def test_the_teacher_itself_scores_perfectly():
    logits = torch.randn(200, NUM_CLASSES)
    found = scored(logits, logits, None, temperature=2.0)
    assert (found.kl, found.kl_at_temperature, found.agreement, found.cross_entropy) == (0, 0, 1, None)
    assert found.calibration_error < 1e-6


def test_divergences_are_taken_at_both_temperatures_from_teacher_to_student():
    own, teachers = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    found = scored(own, teachers, torch.tensor([0]), temperature=2.0)
    assert found.kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert found.kl_at_temperature == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_rows_without_a_label_count_for_the_teacher_alone():
    own = torch.tensor([[math.log(3), 0.0], [9.0, 0.0]])
    found = scored(own, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, -1]))
    assert found.cross_entropy == pytest.approx(-math.log(0.75), rel=1e-5)
    assert found.calibration_error == pytest.approx(0.25, rel=1e-5)
    assert found.agreement == 0.5


def test_calibration_error_weighs_the_gap_of_each_bin_by_its_rows():
    confidence, right = torch.tensor([0.9, 0.9, 0.5, 0.1]), torch.tensor([1.0, 0.0, 0.5, 0.3])
    assert scores.calibration_error(confidence, right) == pytest.approx((0.8 + 0 + 0.2) / 4)


def test_the_arms_are_the_full_logits_ours_and_others(arms):
    assert [arm.name.split(",")[0] for arm in arms] == [
        FULL, "kdcache codes", *["kdcache spectral"] * 3, *["kdcache topk"] * 2, "DistillKit", "random sampling at T=1",
        "random sampling at T=2",
    ]  # fmt: skip
    assert [arm.is_ours for arm in arms] == [False, *[True] * 6, *[False] * 3]


def test_only_sampling_at_another_temperature_is_for_one_temperature(arms):
    assert [arm.temperature for arm in arms] == [None] * 9 + [2.0]


def test_our_arms_take_fewer_bytes_and_go_further_astray_from_one_to_the_next(arms, subject):
    full = arms[0].soft_targets(2.0).float()
    errors = [(arm.soft_targets(2.0).float() - full).abs().sum(1).mean() for arm in arms[1:5]]
    assert errors == sorted(errors)
    sizes = [arm.row_bytes for arm in arms[:5]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(full) == len(subject.train_logits)


def test_renormalised_soft_targets_are_the_teachers_largest(arms, subject):
    stored = arms[7].soft_targets(2.0).float()
    k = int((stored > 0).sum(1).unique())
    assert 1 <= k < NUM_CLASSES
    top = (subject.train_logits / 2).topk(k, dim=1)
    expected = torch.zeros_like(stored).scatter_(1, top.indices, top.values.softmax(1))
    torch.testing.assert_close(stored, expected, atol=0.01, rtol=0.05)


def test_samples_average_to_the_soft_targets_they_were_drawn_from(arms, subject):
    stored = arms[9].soft_targets(2.0).float()
    expected = (subject.train_logits / 2).softmax(1)
    torch.testing.assert_close(stored.mean(0), expected.mean(0), atol=0.01, rtol=0.1)
    assert (stored == 0).any(1).all()


def test_full_logits_agree_in_both_precisions(subject):
    full = FullLogits()
    kept = full.encode(subject.train_logits)
    torch.testing.assert_close(full.log_soft_targets(kept, 2.0).exp().float(), full.soft_targets(kept, 2.0))


def students(values, temperature=1.0):
    return [
        {"temperature": temperature, "seed": seed, "kl": value, "kl_at_temperature": value, "agreement": 0.5,
         "calibration_error": 0.1, "cross_entropy": None}
        for seed, value in enumerate(values)
    ]  # fmt: skip


def arm(name, values, *, row_bytes=100.0, temperature=1.0):
    return {
        "name": name,
        "is_ours": "kdcache" in name,
        "row_bytes": row_bytes,
        "students": students(values, temperature),
    }


FOUND = {
    "title": "made up, 200 classes",
    "plan": {"temperatures": [1.0]},
    "arms": [
        arm("full logits, float32", [1.0, 2.0, 3.0], row_bytes=160.0),
        arm("kdcache spectral, max_kl=0.02", [1.1, 1.9, 3.0]),
        arm("DistillKit, renormalised, k=3", [1.5, 2.5, 3.6]),
        arm("random sampling at T=2, 5 draws", [1.0, 1.0, 1.0], temperature=2.0),
    ],
}


def test_differences_are_those_of_students_of_one_seed():
    one = pairs.paired(FOUND["arms"][1], FOUND["arms"], "kl", 1.0)
    assert one.differences == pytest.approx((0.1, -0.1, 0.0))


def test_the_interval_is_students():
    one = pairs.Paired((0.1, 0.2, 0.3))
    assert (one.mean, one.half_width) == pytest.approx((0.2, 4.303 * 0.1 / math.sqrt(3)))


def test_students_of_other_seeds_are_not_paired():
    lacking = arm("kdcache codes", [1.0])
    with pytest.raises(
        ValueError, match=r"kdcache codes at temperature 1 has seeds \[0\], full logits, float32 \[0, 1, 2\]"
    ):
        pairs.paired(lacking, FOUND["arms"], "kl", 1.0)


def test_tables_star_what_is_seen_and_leave_out_arms_without_students():
    rows = report.table(FOUND, 1.0).splitlines()
    assert len(rows) == 5
    assert rows[2].startswith("| full logits, float32 | 160 | 2.0000 (sd 1.0000) |")
    assert rows[3].startswith("| **kdcache spectral, max_kl=0.02** | 100 | +0.0000 ± 0.2484 |")
    assert rows[4].startswith("| DistillKit, renormalised, k=3 | 100 | +0.5333 ± 0.1434 * |")


def test_the_summary_gives_percents_of_the_full_students_divergence():
    rows = report.summary(FOUND).splitlines()
    assert rows[1:4] == [
        "| --- | ---: | ---: |",
        "| full logits, float32 | 160 | 2.00 nats |",
        "| **kdcache spectral, max_kl=0.02** | 100 | +0.0 % |",
    ]
    assert rows[4:] == [
        "| DistillKit, renormalised, k=3 | 100 | +26.7 % * |",
        "| random sampling at T=2, 5 draws | 100 |  |",
    ]


def test_pictures_of_equal_students_are_equal(tmp_path):
    first, second = (report.draw({"lm": FOUND}, tmp_path / f"{name}.png") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_keeps_the_figures_of_the_subject_it_leaves_out(subject, tmp_path, monkeypatch):
    results = tmp_path / "students.json"
    results.write_text(json.dumps({"subjects": {"image": FOUND}}))
    monkeypatch.setitem(runner.OPENERS, "lm", lambda _: subject)
    rows = runner.run(["lm"], plans={"lm": replace(PLAN, steps=2)}, results=results)
    found = json.loads(results.read_text())["subjects"]
    assert list(found) == ["image", "lm"]
    assert [len(one["students"]) for one in found["lm"]["arms"]] == [4] * 9 + [2]
    assert len(rows) == 9
    assert results.with_suffix(".png").exists()
