"""Students that read windows: arms decoded by the batch, training, scores by text, runs that go on, on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.fidelity.peers import DistillKit, RandomSampling
from benchmarks.students import report, runner, window_runner
from benchmarks.students.kept_rows import FullRows, SparseRows, open_row_arms, soften
from benchmarks.students.training import soft_gradient
from benchmarks.students.transformer import CausalTransformer
from benchmarks.students.window_training import Trainer, soft_gradient_at
from benchmarks.students.windows import WindowPlan, Windows, WindowSubject

NUM_CLASSES = 200
LENGTH = 16
NUM_HIDDEN = 32
PLAN = WindowPlan(
    num_train_windows=(40, 20), num_held_out_windows=8, width=32, depth=2, num_heads=2, steps=60, batch_windows=4,
    learning_rates=(0.003, 0.03), seeds=2, temperatures=(1.0, 2.0),
)  # fmt: skip


def windows(num_windows, generator, embedding):
    tokens = torch.randint(NUM_CLASSES, (num_windows, LENGTH + 1), generator=generator)
    noise = 0.5 * torch.randn(num_windows, LENGTH, NUM_HIDDEN, generator=generator)
    return Windows(
        tokens=tokens[:, :-1], following=tokens[:, 1:], text=torch.arange(num_windows) % 2,
        hidden=(embedding[tokens[:, :-1]] + noise).flatten(0, 1).bfloat16(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    """A teacher whose hidden state is its last token's, with noise, and whose head is drawn at random."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(NUM_CLASSES, NUM_HIDDEN, generator=generator)
    return WindowSubject(
        name="transformer", title="made up, 200 classes", train=windows(60, generator, embedding),
        held_out=windows(16, generator, embedding),
        head=(0.4 * torch.randn(NUM_CLASSES, NUM_HIDDEN, generator=generator)).bfloat16().float(),
        student=lambda: CausalTransformer(NUM_CLASSES, window=LENGTH, width=32, depth=2, num_heads=2),
        forward_tokens_per_second=1000.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def arms(subject, tmp_path_factory):
    return list(open_row_arms(subject, PLAN.temperatures, tmp_path_factory.mktemp("arms")))


def softened(arm, subject, chosen, temperature):
    out = torch.full((len(chosen) * LENGTH, subject.num_classes), 7.0, dtype=torch.bfloat16)
    arm.soften_into(out, torch.tensor(chosen), temperature)
    return out.float()


def test_a_transformer_sees_its_own_window_up_to_each_token():
    torch.manual_seed(0)
    student = CausalTransformer(50, window=6, width=16, depth=2, num_heads=2)
    first, second = (student(torch.tensor([tokens])) for tokens in ([1, 2, 3, 4], [1, 2, 9, 4]))
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 3], second[:, 3])
    assert first.shape == (1, 4, 50)


def test_the_arms_are_full_logits_twice_ours_and_others(arms):
    assert [arm.name.split(",")[0] for arm in arms] == [
        *["full logits"] * 2, *["kdcache spectral"] * 3, *["kdcache topk"] * 2, "DistillKit",
        "random sampling at T=1", "random sampling at T=2",
    ]  # fmt: skip
    assert [arm.temperature for arm in arms] == [None] * 9 + [2.0]
    assert [arm.is_ours for arm in arms] == [False] * 2 + [True] * 5 + [False] * 3


def test_full_rows_are_the_teachers_in_the_order_of_the_windows_asked_for(arms, subject):
    expected = (subject.logits(subject.train.hidden).view(60, LENGTH, -1)[[5, 2]].flatten(0, 1) / 2).softmax(1)
    torch.testing.assert_close(softened(arms[0], subject, [5, 2], 2.0), expected, atol=0, rtol=0.005)


def test_rounded_logits_are_hardly_off_and_coarser_codes_are_further_off(arms, subject):
    expected = softened(arms[0], subject, [3, 4], 2.0)
    errors = [float((softened(arm, subject, [3, 4], 2.0) - expected).abs().sum(1).mean()) for arm in arms[1:5]]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.02
    sizes = [arm.row_bytes for arm in arms[:5]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_of_topk_are_what_its_cache_decodes(arms, subject, temperature):
    for arm in arms[5:7]:
        codes = arm.kept["codes"].view(torch.int16).view(60, LENGTH, -1)[[7, 1]].flatten(0, 1).view(torch.uint16)
        expected = arm.way.ours.soft_targets({"codes": codes}, temperature)
        torch.testing.assert_close(softened(arm, subject, [7, 1], temperature), expected, atol=0, rtol=0.005)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalised_rows_are_those_of_the_packed_format(arms, subject, temperature):
    arm = arms[7]
    kit = DistillKit(NUM_CLASSES, k=arm.kept["classes"].shape[1], leftover="zero")
    logits = subject.logits(subject.train.hidden[: 2 * LENGTH])
    expected = kit.soft_targets(kit.encode(logits), temperature)
    torch.testing.assert_close(softened(arm, subject, [0, 1], temperature), expected, atol=0, rtol=0.005)


@pytest.mark.parametrize(("place", "temperature"), [(8, 1.0), (8, 2.0), (9, 2.0)])
def test_sampled_rows_are_those_of_the_drawn_format(arms, subject, place, temperature):
    arm = arms[place]
    num_draws = int(arm.name.split()[-2])
    stored = arm.way.stored_temperature
    sampling = RandomSampling(NUM_CLASSES, num_draws, stored_temperature=stored)
    drawn = sampling.encode(subject.logits(subject.train.hidden))
    expected = sampling.soft_targets(drawn, temperature)[: 2 * LENGTH]
    torch.testing.assert_close(softened(arm, subject, [0, 1], temperature), expected, atol=1e-6, rtol=0.005)


def test_classes_that_are_not_kept_have_no_weight():
    out = torch.ones(1, 4, dtype=torch.bfloat16)
    kept = {"classes": torch.tensor([[2, 0]]), "log_weights": torch.tensor([[0.0, -torch.inf]])}
    SparseRows(1.0).soften_into(out, kept, 2.0)
    assert out.tolist() == [[0, 0, 1, 0]]


def test_full_rows_rounded_to_bfloat16_are_not_the_same(subject):
    kept = {"hidden": subject.train.hidden[:8]}
    out = [torch.empty(8, NUM_CLASSES, dtype=torch.bfloat16) for _ in range(2)]
    FullRows(subject.head, soften).soften_into(out[0], kept, 1.0)
    FullRows(subject.head, soften, torch.bfloat16).soften_into(out[1], kept, 1.0)
    assert not torch.equal(out[0], out[1])
    torch.testing.assert_close(out[0], out[1], atol=0.01, rtol=0.1)


def test_the_gradient_of_all_rows_at_once_is_that_of_a_few_at_a_time():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 300, generator=generator)
    soft_targets = 0.8 * torch.randn(12, 300, generator=generator).softmax(1)
    found = soft_gradient_at(logits, soft_targets, torch.tensor(3.0))
    torch.testing.assert_close(found, soft_gradient(logits, soft_targets, 3.0), rtol=1e-4, atol=1e-8)


def test_a_student_follows_from_its_seed_whoever_was_trained_before(arms, subject):
    trainer = Trainer(subject, replace(PLAN, steps=5))
    weights = []
    for seed in (3, 4, 3):
        trainer.train(arms[0], 2.0, seed, 0.01)
        weights.append(trainer.student.embedding.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=0)
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_a_student_comes_nearer_to_its_teacher(arms, subject, temperature):
    plan = replace(PLAN, steps=300)
    question = window_runner.WindowQuestion(subject, plan, arms, Trainer(subject, plan))
    before = question.scores(temperature)
    question.trainer.train(arms[0], temperature, 0, 0.01)
    after = question.scores(temperature)
    assert after["kl_at_temperature"] < 0.7 * before["kl_at_temperature"]
    assert after["kl"] == pytest.approx((after["kl_main"] + after["kl_other"]) / 2, rel=1e-5)


class Teacher(nn.Module):
    """Gives the logits of the teacher for windows held out."""

    def __init__(self, subject):
        super().__init__()
        self.subject = subject

    def forward(self, tokens):
        held_out = self.subject.held_out
        places = (tokens[:, None] == held_out.tokens).all(2).int().argmax(1)
        return self.subject.logits(held_out.hidden.unflatten(0, held_out.tokens.shape)[places])


def test_the_teacher_itself_scores_perfectly(arms, subject):
    question = window_runner.WindowQuestion(subject, PLAN, arms, Trainer(subject, PLAN))
    question.trainer.student = Teacher(subject)
    found = question.scores(2.0)
    assert (found["kl"], found["kl_at_temperature"], found["agreement"]) == (0, 0, 1)


@pytest.mark.slow
def test_a_run_goes_on_from_the_seeds_it_has(subject, tmp_path, monkeypatch):
    results = tmp_path / "gpu.json"
    plan = replace(PLAN, steps=3)
    monkeypatch.setattr(runner, "open_windows", lambda *_: subject)
    runner.run_transformer(plan, torch.device("cpu"), results=results)
    whole = json.loads(results.read_text())["subjects"]["transformer"]
    kept = {**whole, "arms": [{**arm, "students": [one for one in arm["students"] if one["seed"] == 1]}
                              for arm in whole["arms"]]}  # fmt: skip
    results.write_text(json.dumps({"subjects": {"transformer": kept}}))
    runner.run_transformer(plan, torch.device("cpu"), results=results)
    again = json.loads(results.read_text())["subjects"]["transformer"]
    assert [len(arm["students"]) for arm in again["arms"]] == [4] * 9 + [2]
    assert sorted(one["seed"] for one in again["arms"][0]["students"]) == [0, 0, 1, 1]
    by_seed = {(one["seed"], one["temperature"]): one["kl"] for one in whole["arms"][0]["students"]}
    assert {(one["seed"], one["temperature"]): one["kl"] for one in again["arms"][0]["students"]} == by_seed
    assert results.with_suffix(".png").exists()


def test_no_seed_is_begun_that_would_end_too_late(subject, monkeypatch):
    clock = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr(window_runner, "monotonic", lambda: next(clock))
    found = list(window_runner.run_windows(subject, replace(PLAN, steps=2), until_seconds=20.0))
    assert [one["seconds_a_seed"] for one in found] == [10.0]


def test_speeds_are_given_to_two_figures():
    rows = report.speeds({"speeds": [{"what": "decode", "rows_per_second": 123_456.0}]}).splitlines()
    assert rows[2:] == ["| decode | 120,000 |"]
