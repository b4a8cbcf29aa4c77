"""No row's KL is above its bound at any temperature from 1 up: a hunt among random and adversarial rows."""

import pytest
import torch

from kdcache.codecs import BOUND_TEMPERATURES, LADDER, measure, scaled_bounds

TEMPERATURES = (1.0, 1.2, 1.5, 1.9, 2.0, 2.5, 3.3, 4.0, 5.0, 8.0, 20.0, 77.0, 1000.0)
SIZES = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 5.0, 50.0)
MEASURED = 1e-15
"""What `measure` may be off by, in nats."""


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def random_logits(num_rows, num_classes, seed):
    """Bell-shaped, heavy-tailed, tied, one-hot, constant and very wide rows, in turn."""
    logits = torch.randn(num_rows, num_classes, generator=drawn(seed)) * 3
    logits[1::6] **= 3
    logits[2::6] = logits[2::6].round()
    logits[3::6] = 0
    logits[3::6, 0] = 40
    logits[4::6] = -7.5
    logits[5::6] *= 1e3
    return logits


def everywhere(logits, size, generator):
    return (torch.rand(logits.shape, generator=generator) - 0.5) * size


def on_the_likeliest(logits, size, _generator):
    return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), size)


def on_the_least_likely(logits, size, _generator):
    return torch.zeros_like(logits).scatter_(1, logits.argmin(1, keepdim=True), size)


def below_the_likeliest(logits, size, generator):
    return -on_the_likeliest(logits, size, generator)


def with_the_depth(logits, size, _generator):
    return size * (logits.amax(1, keepdim=True) - logits) / 40


def shifted(logits, size, generator):
    return everywhere(logits, size, generator) - logits.amax(1, keepdim=True)


def heavy_tailed(logits, size, generator):
    return size * torch.randn(logits.shape, generator=generator) ** 5 / 20


ERRORS = [
    everywhere,
    on_the_likeliest,
    on_the_least_likely,
    below_the_likeliest,
    with_the_depth,
    shifted,
    heavy_tailed,
]


def excess(logits, decoded, temperatures=TEMPERATURES):
    """By how much KL is above the bound at most, over all rows and temperatures; beyond the measuring's own error."""
    bounds = scaled_bounds(logits, decoded)
    divergences = measure(logits, decoded, temperatures)
    worst = -torch.inf
    for index, temperature in enumerate(temperatures):
        for interval, start in enumerate(BOUND_TEMPERATURES):
            ends = [*BOUND_TEMPERATURES[1:], torch.inf][interval]
            if start <= temperature <= ends:
                allowed = bounds[:, interval] / temperature**2 * (1 + 1e-9) + MEASURED
                worst = max(worst, float((divergences[:, index] - allowed).max()))
    return worst


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_no_row_of_few_classes_violates_its_bound(errors, num_classes):
    generator = drawn(num_classes)
    for seed, size in enumerate(SIZES):
        logits = random_logits(600, num_classes, seed)
        assert excess(logits, logits + errors(logits, size, generator)) <= 0


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("size", SIZES)
def test_no_row_worked_on_in_float32_violates_its_bound(errors, size, monkeypatch):
    monkeypatch.setattr("kdcache.codecs.bounds._PRECISE_CLASSES", 0)
    for num_classes in (2, 17, 90):
        logits = random_logits(300, num_classes, num_classes)
        assert excess(logits, logits + errors(logits, size, drawn(3))) <= 0


@pytest.mark.parametrize("errors", ERRORS)
def test_no_wide_row_violates_its_bound(errors):
    logits = random_logits(6, 20_000, 5)
    for size in SIZES:
        assert excess(logits, logits + errors(logits, size, drawn(6)), (1.0, 1.6, 3.0, 9.0)) <= 0


@pytest.mark.parametrize("errors", [everywhere, shifted, on_the_least_likely])
def test_no_row_of_262144_classes_violates_its_bound(errors):
    logits = random_logits(6, 262_144, 7)
    assert excess(logits, logits + errors(logits, 0.05, drawn(8)), (1.0, 3.0, 20.0)) <= 0


@pytest.mark.parametrize("precise_classes", [0, 4096])
@pytest.mark.parametrize("size", SIZES)
def test_masked_classes_neither_weigh_nor_err(size, precise_classes, monkeypatch):
    monkeypatch.setattr("kdcache.codecs.bounds._PRECISE_CLASSES", precise_classes)
    logits = random_logits(120, 30, 9)
    decoded = logits + everywhere(logits, size, drawn(10))
    masked = torch.full((120, 5), -torch.inf)
    with_masked = scaled_bounds(torch.cat([logits, masked], 1), torch.cat([decoded, masked], 1))
    torch.testing.assert_close(with_masked, scaled_bounds(logits, decoded), rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("num_classes", [50, 1000, 20_000])
def test_small_errors_are_bounded_within_twice_their_kl(num_classes, temperature):
    logits = torch.randn(20, num_classes, generator=drawn(11)) * 3
    decoded = (logits / 0.05).round() * 0.05
    interval = sum(start <= temperature for start in BOUND_TEMPERATURES) - 1
    bounds = scaled_bounds(logits, decoded)[:, interval] / temperature**2
    assert float((bounds / measure(logits, decoded, [temperature])[:, 0]).median()) <= 2


def test_the_ladder_has_a_bound_everywhere():
    assert min(LADDER) >= BOUND_TEMPERATURES[0]
