"""A student sees the same loss from a cache as from the live teachers, at every temperature, on real handwriting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache import Codes, Lossless, SoftTargetLoader, TopK, build_cache, distillation_loss, open_cache

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
MEANS = ("geometric", "arithmetic")


@pytest.fixture(scope="module", params=[Codes(), Codes(dtype="uint16"), Codes(spacing="uniform"), Lossless()], ids=str)
def cache(request, tmp_path_factory, digits, digit_teachers):
    address = tmp_path_factory.mktemp("agree") / "cache"
    build_cache(address, digits.transfer_set, digit_teachers, codec=request.param)
    return open_cache(address)


@pytest.fixture(scope="module")
def live_logits(digits, digit_teachers):
    with torch.inference_mode():
        return torch.stack([teacher(digits.inputs) for teacher in digit_teachers.values()], dim=1)


@pytest.fixture(scope="module")
def student_logits(digits):
    torch.manual_seed(7)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.inference_mode():
        return 3 * student(digits.inputs)


def loss_bound(cache, student_logits, temperature):
    """Half the L1 distance of the targets times the spread of the student's log-probabilities bounds the difference
    of two cross-entropies: |sum_i (p_i - p'_i) log q_i| <= TV(p, p') (max log q - min log q)."""
    spread = (student_logits.amax(dim=1) - student_logits.amin(dim=1)) / temperature
    stated = cache.certificate(temperature).total_variation_bound
    return stated * float(spread.mean()) * temperature**2 + 1e-5 * temperature**2


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_loss_is_the_same_to_within_the_stated_error(cache, digits, live_logits, student_logits, temperature, mean):
    soft_targets = cache.read(range(len(digits.labels)))
    options = {"temperature": temperature, "soft_weight": 1.0, "mean": mean, "divergence": "cross-entropy"}
    cached = distillation_loss(student_logits, soft_targets, **options)
    live = distillation_loss(student_logits, live_logits, **options)
    assert abs(float(cached) - float(live)) <= loss_bound(cache, student_logits, temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_no_row_is_further_from_its_teacher_than_stated(cache, digits, live_logits, temperature):
    soft_targets = cache.read(range(len(digits.labels)))
    for index, name in enumerate(cache.teacher_names):
        cached = soft_targets.probabilities(temperature, teachers=[name])
        live = torch.softmax(live_logits[:, index] / temperature, dim=1)
        distance = 0.5 * (cached - live).abs().sum(dim=1).max()
        assert float(distance) <= cache.certificate(temperature).total_variation_bound + 1e-6


def train_a_little(batches):
    torch.manual_seed(0)
    student = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    losses = []
    for inputs, labels, soft_targets in batches:
        loss = distillation_loss(student(inputs), soft_targets, labels, temperature=4.0, soft_weight=0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_from_the_cache_goes_as_training_from_the_live_teachers(cache, digits, digit_teachers):
    batches = list(SoftTargetLoader(cache, digits.transfer_set, batch_size=128, seed=3))
    with torch.no_grad():
        live = [
            (inputs, labels, torch.stack([teacher(inputs) for teacher in digit_teachers.values()], dim=1))
            for inputs, labels, _ in batches
        ]
    assert train_a_little(batches) == pytest.approx(train_a_little(live), rel=1e-3)


@pytest.fixture(
    scope="module", params=[TopK(k=4), TopK(k=4, tail="samples", num_samples=3)], ids=lambda spec: spec.tail
)
def topk_cache(request, tmp_path_factory, digits, digit_teachers):
    address = tmp_path_factory.mktemp("topk") / "cache"
    build_cache(address, digits.transfer_set, digit_teachers, codec=request.param)
    return open_cache(address)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_largest_probabilities_are_those_of_the_live_teachers(topk_cache, digits, live_logits, temperature):
    soft_targets = topk_cache.read(range(len(digits.labels)))
    for index, name in enumerate(topk_cache.teacher_names):
        live, kept = torch.softmax(live_logits[:, index] / temperature, dim=1).topk(4, dim=1)
        cached = soft_targets.probabilities(temperature, teachers=[name]).gather(1, kept)
        assert float((cached - live).abs().max()) < 0.06 / temperature


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_no_row_is_further_from_its_teacher_than_was_measured(topk_cache, digits, live_logits, temperature):
    """Of the kept classes and all others as one: Pinsker's inequality, with what every row was measured to lose."""
    soft_targets = topk_cache.read(range(len(digits.labels)))
    measured = topk_cache.certificate(temperature)
    assert measured.num_measured_rows == 3 * len(digits.labels)
    for index, name in enumerate(topk_cache.teacher_names):
        live, kept = torch.softmax(live_logits[:, index].double() / temperature, dim=1).topk(4, dim=1)
        cached = soft_targets.probabilities(temperature, teachers=[name]).double().gather(1, kept)
        distance = ((cached - live).abs().sum(dim=1) + (cached.sum(dim=1) - live.sum(dim=1)).abs()) / 2
        assert float(distance.max()) <= (measured.max_kl / 2) ** 0.5 + 1e-5


LEAST_AGREEMENT = {"class-means": 0.9, "samples": 0.97}
"""Class means give every row the same shape of tail, which teaches a student something else; samples are unbiased."""


def test_training_from_topk_goes_about_as_training_from_the_live_teachers(topk_cache, digits, digit_teachers):
    with torch.no_grad():
        live = torch.stack([teacher(digits.inputs) for teacher in digit_teachers.values()], dim=1)
    cached = topk_cache.read(range(len(digits.labels)))
    students = [train_on(digits.inputs, soft_targets) for soft_targets in (cached, live)]
    agree = students[0].argmax(dim=1) == students[1].argmax(dim=1)
    tail = next(iter(topk_cache.teachers.values())).codec.tail
    assert float(agree.float().mean()) > LEAST_AGREEMENT[tail]


def train_on(inputs, soft_targets):
    """Logits of a student that has learned the arithmetic mean of the soft targets at temperature 4."""
    torch.manual_seed(0)
    student = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    for _ in range(100):
        loss = distillation_loss(student(inputs), soft_targets, temperature=4.0, soft_weight=1.0, mean="arithmetic")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student(inputs).detach()
