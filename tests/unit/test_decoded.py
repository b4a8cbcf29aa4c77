"""Soft targets that are decoded once for several students."""

import pytest
import torch

from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, Spectral, TopK
from kdcache.losses import distillation_loss
from kdcache.soft_targets import SoftTargets

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(20, 2, 6, generator=GENERATOR) @ torch.randn(6, 30, generator=GENERATOR) * 2
LOGITS = LOGITS.bfloat16().float()
STUDENT = torch.randn(20, 30, generator=GENERATOR)
LABELS = torch.arange(20)
DECODED_ONCE = [Codes(), Codes(dtype="uint16"), Lossless(dtype="bfloat16"), Lossless(), Spectral(step=0.05)]
STAY_CODED = [TopK(k=4), TopK(k=4, tail="samples", num_samples=4)]
SETTINGS = [(1.0, "forward-kl"), (2.0, "reverse-kl"), (8.0, "logit-matching")]


def decoder_for(spec, logits):
    if isinstance(spec, Spectral):
        codec, parameters = SpectralCodec.fitted(spec, logits.shape[1], logits)
    else:
        codec = codec_for(spec, logits.shape[1])
        parameters = codec.fit(logits)
    return Decoder(codec, parameters_to(parameters, "cpu"))


def coded(spec, **options):
    members = LOGITS.unbind(1)
    decoders = tuple(decoder_for(spec, member) for member in members)
    codes = tuple(decoder.encode(member) for decoder, member in zip(decoders, members, strict=True))
    return SoftTargets(codes, decoders, ("a", "b"), **options)


def loss_and_gradient(soft_targets, temperature, divergence):
    student = STUDENT.clone().requires_grad_()
    loss = distillation_loss(
        student, soft_targets, LABELS, temperature=temperature, divergence=divergence, mean="arithmetic"
    )
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


every_codec = pytest.mark.parametrize("spec", [*DECODED_ONCE, *STAY_CODED], ids=str)


@every_codec
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoded_soft_targets_are_those_of_the_codes(spec, temperature):
    soft_targets = coded(spec)
    found = soft_targets.decoded().log_probabilities(temperature, mean="arithmetic")
    expected = soft_targets.log_probabilities(temperature, mean="arithmetic")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("spec", DECODED_ONCE, ids=str)
@pytest.mark.parametrize(("temperature", "divergence"), SETTINGS)
def test_losses_of_decoded_soft_targets_are_those_of_the_codes(spec, temperature, divergence):
    soft_targets = coded(spec)
    found = loss_and_gradient(soft_targets.decoded(), temperature, divergence)
    expected = loss_and_gradient(soft_targets, temperature, divergence)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_three_losses_of_decoded_soft_targets_take_one_decoding_of_each_teacher(monkeypatch):
    seen = []
    plain = SpectralCodec.decode

    def decode(self, codes, parameters, **options):
        seen.append(len(codes))
        return plain(self, codes, parameters, **options)

    monkeypatch.setattr(SpectralCodec, "decode", decode)
    decoded = coded(Spectral(step=0.05)).decoded()
    for temperature, divergence in SETTINGS:
        loss_and_gradient(decoded, temperature, divergence)
    assert seen == [20, 20]


def test_losses_leave_decoded_soft_targets_as_they_were():
    decoded = coded(Codes()).decoded()
    before = decoded.logits()
    loss_and_gradient(decoded, 1.0, "forward-kl")
    torch.testing.assert_close(decoded.logits(), before, rtol=0, atol=0)


@pytest.mark.parametrize("spec", DECODED_ONCE, ids=str)
def test_decoded_soft_targets_are_float32_logits(spec):
    decoded = coded(spec).decoded()
    assert [(codes.dtype, codes.shape) for codes in decoded.codes] == [(torch.float32, (20, 30))] * 2


@pytest.mark.parametrize("spec", STAY_CODED, ids=str)
def test_what_is_decoded_anew_at_every_temperature_stays_coded(spec):
    soft_targets = coded(spec)
    assert soft_targets.decoded().codes == soft_targets.codes


def test_float32_logits_are_not_copied():
    soft_targets = coded(Lossless())
    assert soft_targets.decoded().codes == soft_targets.codes


def test_decoded_soft_targets_keep_which_rows_are_available():
    decoded = coded(Codes(), available=torch.arange(20) < 15).decoded()
    assert decoded.probabilities(2.0).isnan().all(dim=1).tolist() == [False] * 15 + [True] * 5


def test_decoded_soft_targets_keep_the_rows_of_examples():
    num_rows = torch.tensor([12, 8])
    assert coded(Codes(), num_rows=num_rows).decoded().num_rows is num_rows


def test_a_merged_cache_stays_merged_when_decoded():
    soft_targets = coded(Codes())
    merged = SoftTargets(soft_targets.codes[:1], soft_targets.decoders[:1], ("a", "b"), merge="geometric")
    assert merged.decoded().merge == "geometric"
