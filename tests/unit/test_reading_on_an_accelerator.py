"""What is read on an accelerator is what is read on the processor, whatever precision torch may take there."""

import pytest
import torch

from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, Spectral, TopK
from kdcache.losses import distillation_loss
from kdcache.soft_targets import MEANS, SoftTargets

pytestmark = pytest.mark.accelerator

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(300, 2, 20, generator=GENERATOR) @ torch.randn(20, 700, generator=GENERATOR)
LOGITS = LOGITS.bfloat16().float()
SPECS = [
    Codes(),
    Codes(dtype="uint16"),
    Lossless(),
    Lossless(dtype="bfloat16"),
    Spectral(max_kl=0.01),
    TopK(k=8),
    TopK(k=8, tail="samples", num_samples=8),
]
every_codec = pytest.mark.parametrize("spec", SPECS, ids=str)


@pytest.fixture(autouse=True)
def _in_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def decoder_for(spec, logits):
    if isinstance(spec, Spectral):
        codec, parameters = SpectralCodec.fitted(spec, logits.shape[1], logits)
    else:
        codec = codec_for(spec, logits.shape[1])
        parameters = codec.fit(logits)
    return Decoder(codec, parameters_to(parameters, "cpu"))


def coded(spec):
    members = LOGITS.unbind(1)
    decoders = tuple(decoder_for(spec, member) for member in members)
    codes = tuple(decoder.encode(member) for decoder, member in zip(decoders, members, strict=True))
    return SoftTargets(codes, decoders, ("a", "b"))


@every_codec
def test_soft_targets_are_those_of_the_processor(spec):
    soft_targets = coded(spec)
    found = soft_targets.to("cuda").probabilities(2.0, mean="arithmetic")
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), soft_targets.probabilities(2.0, mean="arithmetic"), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mean", MEANS)
def test_blocks_of_rows_give_the_whole(mean, monkeypatch):
    soft_targets = coded(Spectral(max_kl=0.01)).to("cuda")
    expected = soft_targets.log_probabilities(2.0, mean=mean)
    monkeypatch.setattr("kdcache.soft_targets.means.ACCELERATOR_ELEMENTS", 2**12)
    monkeypatch.setattr("kdcache.soft_targets.batch._DECODED_ELEMENTS", 2**14)
    torch.testing.assert_close(soft_targets.log_probabilities(2.0, mean=mean), expected, rtol=1e-4, atol=1e-5)


@every_codec
def test_a_loss_and_its_gradient_are_those_of_the_processor(spec):
    soft_targets = coded(spec)
    student = torch.randn(300, 700, generator=torch.Generator().manual_seed(1))
    slopes = []
    for device in ("cpu", "cuda"):
        there = student.to(device).requires_grad_()
        loss = distillation_loss(there, soft_targets, temperature=2.0, soft_weight=1.0, mean="arithmetic")
        slopes.append(torch.autograd.grad(loss, there)[0].cpu())
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-8)


def test_spectral_decoding_is_as_precise_as_without_tf32():
    soft_targets = coded(Spectral(max_kl=0.01)).to("cuda")
    found = soft_targets.logits()
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found, soft_targets.logits(), rtol=1e-5, atol=1e-5)


def test_spectral_rows_coded_on_an_accelerator_meet_the_target():
    decoder = decoder_for(Spectral(max_kl=0.01), LOGITS[:, 0])
    codes = decoder.to("cuda").encode(LOGITS[:, 0].cuda()).cpu()
    log_p, log_q = (torch.log_softmax(values.double(), 1) for values in (LOGITS[:, 0], decoder.decode(codes)))
    assert float((log_p.exp() * (log_p - log_q)).sum(1).mean()) <= 0.01


def test_bfloat16_products_decode_as_on_the_processor():
    soft_targets = coded(Spectral(max_kl=0.01, precision="bfloat16"))
    torch.testing.assert_close(soft_targets.to("cuda").logits().cpu(), soft_targets.logits(), rtol=2e-2, atol=2e-2)
