"""Rounded logits: their type is found, their noise is known, and the spectral codec counts it as no rank."""

import pytest
import torch

from kdcache.codecs import Decoder, fitted_codec, measure, parameters_to
from kdcache.codecs.rounding import coarsest_dtype, rounding_noise
from kdcache.codecs.spectral.fit import fit_basis
from kdcache.documents import Spectral

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def spanned(num_rows, num_classes, *, rank=32, scale=3.0, decay=0.0, seed=0):
    """Give logits of a known rank, float32; later components are smaller by `decay` each in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, rank, generator=generator) * torch.exp(-decay * torch.arange(rank))
    return hidden @ torch.randn(rank, num_classes, generator=generator) * scale / rank**0.5


# types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("cast", [None, torch.float32, torch.float64])
def test_logits_that_were_rounded_are_known_whatever_their_type_is_now(dtype, cast):
    assert coarsest_dtype(spanned(50, 20).to(dtype).to(cast or dtype)) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_all_their_digits_were_not_rounded(dtype):
    assert coarsest_dtype(spanned(50, 20).to(dtype)) is None


def test_one_logit_tells_that_the_others_were_not_rounded():
    logits = spanned(50, 20).bfloat16().float()
    logits[49, 19] = 0.1
    assert coarsest_dtype(logits) is None


# noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_noise_is_that_of_the_errors(dtype):
    logits = spanned(2000, 40, scale=8)
    weights = torch.linspace(0.1, 3, 40)
    noise = rounding_noise(logits.to(dtype), weights, dtype)
    squares = (logits.to(dtype).double() - logits.double()).square() * weights
    assert torch.allclose(noise.of_classes, squares.sum(dim=0), rtol=0.25)
    assert float(noise.of_rows.sum()) == pytest.approx(float(squares.sum()), rel=0.02)


def test_zeros_are_exact():
    assert float(rounding_noise(torch.zeros(3, 4), torch.ones(4), torch.bfloat16).of_rows.sum()) == 0


def test_the_smallest_halves_are_equally_far_apart():
    tiny = torch.full((1, 2), 2.0**-24)
    assert rounding_noise(tiny, torch.ones(2), torch.float16).of_classes[0].item() == pytest.approx(2.0**-48 / 12)


# rank -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2000, 300), (300, 2000), (600, 600)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_the_rank_is_the_logits_own_whatever_they_were_rounded_to(shape, scale, dtype):
    logits = spanned(*shape, scale=scale).to(dtype)
    assert len(fit_basis(logits).basis) == len(fit_basis(logits.float()).basis) == 32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_components_that_grow_small_are_kept_as_far_as_they_show(seed, dtype):
    logits = spanned(1000, 400, decay=0.1, seed=seed)
    assert len(fit_basis(logits.to(dtype)).basis) == 32


def test_a_full_rank_stays_full():
    logits = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0)) * 3
    assert len(fit_basis(logits.bfloat16()).basis) == 99


def test_a_rank_that_is_asked_for_holds_the_rounding_too():
    assert len(fit_basis(spanned(600, 100).bfloat16(), rank=99).basis) == 99


def test_logits_without_any_spread_have_one_component():
    assert len(fit_basis(torch.ones(30, 10).bfloat16()).basis) == 1


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("max_kl", [0.05, 0.01, 1e-3])
def test_the_target_is_met_by_every_row_of_rounded_logits(dtype, max_kl):
    logits = spanned(1200, 300, scale=6).to(dtype)
    codec, parameters = fitted_codec(Spectral(max_kl=max_kl), 300, logits[:1000])
    decoder = Decoder(codec, parameters_to(parameters, "cpu"))
    measured = measure(logits[1000:].float(), decoder.decode(decoder.encode(logits[1000:])), [1, 2, 4])
    assert codec.num_components == 32
    assert float(measured.mean(dim=0).amax()) <= max_kl
    assert float(measured.amax()) <= 2 * max_kl
