"""What is measured of a codec is measured on what it decodes at each temperature."""

import pytest
import torch

from kdcache.codecs import LADDER, Decoder, codec_for, measure, measure_codes, parameters_to
from kdcache.documents import Codes, TopK

LOGITS = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 3


def coded(spec, logits=LOGITS):
    codec = codec_for(spec, logits.shape[1])
    decoder = Decoder(codec, parameters_to(codec.fit(logits), "cpu"))
    return decoder, decoder.encode(logits)


def lumped_kl(decoder, codes, temperature, k):
    """From the decoded log-weights and the largest logits alone."""
    true = torch.softmax(LOGITS.double() / temperature, 1)
    found = (decoder.decode(codes, temperature=temperature).double() / temperature).exp()
    top = LOGITS.topk(k, 1).indices
    p, q = true.gather(1, top), found.gather(1, top)
    p, q = (torch.cat([part, 1 - part.sum(1, keepdim=True)], 1) for part in (p, q))
    return (p * (p / q).log()).sum(1)


def test_a_codec_that_serves_every_temperature_is_measured_on_its_logits():
    decoder, codes = coded(Codes())
    assert torch.equal(measure_codes(decoder, LOGITS, codes), measure(LOGITS, decoder.decode(codes)))


def test_a_codec_that_depends_on_the_temperature_is_measured_as_it_decodes_there():
    decoder, codes = coded(TopK(k=4))
    found = measure_codes(decoder, LOGITS, codes)
    for place, temperature in enumerate(LADDER):
        decoded = decoder.decode(codes, temperature=temperature)
        assert torch.equal(found[:, place], measure(LOGITS, decoded, [temperature])[:, 0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sampled_soft_targets_are_measured_with_all_unkept_classes_as_one(temperature):
    decoder, codes = coded(TopK(k=4, tail="samples", num_samples=5))
    found = measure_codes(decoder, LOGITS, codes, [temperature])[:, 0]
    torch.testing.assert_close(found, lumped_kl(decoder, codes, temperature, 4), rtol=1e-3, atol=1e-7)


def test_a_coarser_step_costs_sampled_soft_targets_more():
    fine, coarse = (
        measure_codes(decoder, LOGITS, codes).mean()
        for decoder, codes in (coded(TopK(k=4, tail="samples", step=step)) for step in (2**-6, 0.5))
    )
    assert 0 < fine < coarse / 10


@pytest.mark.parametrize("num_allowed", [1, 3, 8])
def test_rows_with_masked_classes_have_a_finite_measure(num_allowed):
    masked = LOGITS.clone()
    masked[:, num_allowed:] = -torch.inf
    decoder, codes = coded(TopK(k=4, tail="samples"), masked)
    assert bool((measure_codes(decoder, masked, codes) < 0.01).all())
