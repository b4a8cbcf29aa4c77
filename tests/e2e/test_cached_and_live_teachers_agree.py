"""A student sees the same loss from a cache as from the live teachers, at every temperature, on real handwriting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache import Codes, Lossless, SoftTargetLoader, build_cache, distillation_loss, open_cache

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
