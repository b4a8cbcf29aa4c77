"""The guard of codes and topk: rows that break a target for KL are refused, all others are coded as without it."""

import numpy as np
import pytest
import torch

from kdcache.codecs import Decoder, codec_for, measure, measure_codes, parameters_to
from kdcache.codecs.guard import refuse_beyond_target
from kdcache.documents import Codes, TopK
from kdcache.errors import CodecError, DocumentError

TEMPERATURES = (1.0, 2.0, 4.0)


def sampled(num_rows=64, num_classes=20, scale=4.0, seed=0):
    return torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed)) * scale


def guarded(spec, max_kl, pilot):
    """Give the decoders of a codec with and without a target."""
    plain = codec_for(spec, pilot.shape[1])
    parameters = parameters_to(plain.fit(pilot), "cpu")
    other = codec_for(type(spec).make(**{**dict(spec), "max_kl": max_kl}), pilot.shape[1])
    return Decoder(other, parameters), Decoder(plain, parameters)


def is_refused(decoder, logits):
    try:
        decoder.encode(logits)
    except CodecError:
        return True
    return False


@pytest.mark.parametrize("spec", [Codes(), Codes(spacing="uniform"), TopK(k=3)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rows_are_refused_exactly_where_they_break_the_target(spec, scale):
    pilot, rows = sampled(), sampled(seed=1)
    rows[::7] *= scale
    measured = measure_codes(plain_decoder(spec, pilot), rows, plain_decoder(spec, pilot).encode(rows), TEMPERATURES)
    mean, largest = float(measured.mean(dim=0).amax()), float(measured.amax())
    found = {}
    for target in np.geomspace(mean / 4, min(1.0, 4 * largest), 25).tolist():
        found[target] = is_refused(guarded(spec, target, pilot)[0], rows)
        assert found[target] == (mean > target or largest > 2 * target), target
    assert set(found.values()) == {True, False}


def plain_decoder(spec, pilot):
    return guarded(spec, 1.0, pilot)[1]


@pytest.mark.parametrize("spec", [Codes(), Codes(dtype="uint16"), TopK(k=3)])
def test_rows_that_keep_to_the_target_are_coded_as_without_it(spec):
    guarding, plain = guarded(spec, 1.0, sampled())
    assert torch.equal(guarding.encode(sampled(seed=1)), plain.encode(sampled(seed=1)))


def test_a_row_of_codes_is_named():
    rows = sampled(seed=1)
    rows[41, 0] = -900.0  # its levels are 16 times as far apart as the pilot's
    decoder, plain = guarded(Codes(), 1e-4, sampled())
    largest = float(measure(rows, plain.decode(plain.encode(rows)), TEMPERATURES)[41].amax())
    with pytest.raises(CodecError, match=rf"^Row 41 has a KL of {largest:.3g} nats .* use Codes\(dtype=\"uint16\"\)"):
        decoder.encode(rows)


def test_a_row_of_topk_is_named():
    pilot, rows = sampled(scale=40), sampled(scale=40, seed=1)
    rows[41] = sampled(1, scale=1, seed=2)[0]  # most of its probability is outside of the kept classes
    decoder, plain = guarded(TopK(k=3), 0.1, pilot)
    largest = float(measure_codes(plain, rows, plain.encode(rows), TEMPERATURES)[41].amax())
    with pytest.raises(CodecError, match=rf"^Row 41 has a KL of {largest:.3g} nats .* use Spectral\(max_kl=0.1\)"):
        decoder.encode(rows)


def test_rows_with_masked_classes_are_measured():
    rows = sampled(seed=1)
    rows[:, 3] = -torch.inf
    decoder, plain = guarded(Codes(), 1e-3, rows)
    assert torch.equal(decoder.encode(rows), plain.encode(rows))
    rows[9, 0] = -900.0
    with pytest.raises(CodecError, match=r"^Row 9 has a KL"):
        decoder.encode(rows)


def test_many_classes_are_measured_in_blocks(monkeypatch):
    rows = sampled(40, 5000, scale=3, seed=1)
    rows[33, 0] = -900.0
    decoder, plain = guarded(Codes(), 1e-3, sampled(16, 5000, scale=3))
    largest = float(measure(rows, plain.decode(plain.encode(rows)), TEMPERATURES).amax())
    monkeypatch.setattr("kdcache.codecs.codes._GUARD_ELEMENTS", 5000 * 7)
    with pytest.raises(CodecError, match=rf"^Row 33 has a KL of {largest:.3g}"):
        decoder.encode(rows)


def test_no_rows_keep_to_any_target():
    decoder, _ = guarded(Codes(), 1e-6, sampled())
    assert decoder.encode(sampled()[:0]).shape == (0, 21)


def test_a_codebook_is_fitted_whatever_its_target():
    pilot = sampled()
    fitted = codec_for(Codes(max_kl=1e-12), 20).fit(pilot)
    assert np.array_equal(fitted["codebook"], codec_for(Codes(), 20).fit(pilot)["codebook"])


def test_rows_whose_mean_is_too_large_are_told_with_the_worst_of_them():
    measured = torch.tensor([[0.011, 0.002, 0.0], [0.015, 0.003, 0.0]], dtype=torch.float64)
    message = (
        r"^Row 1 has a KL of 0.015 nats at temperature 1, the largest of 2 rows whose mean is 0.013 at temperature 1"
    )
    with pytest.raises(CodecError, match=message):
        refuse_beyond_target(measured, 0.01, remedy="use more")


def test_a_mean_is_held_at_each_temperature_by_itself():
    measured = torch.tensor([[0.018, 0.0, 0.0], [0.0, 0.018, 0.0]], dtype=torch.float64)
    refuse_beyond_target(measured, 0.01, remedy="use more")


def test_a_row_without_a_number_is_refused():
    with pytest.raises(CodecError, match=r"^Row 1 has a KL of nan"):
        refuse_beyond_target(torch.tensor([[0.0] * 3, [torch.nan] * 3], dtype=torch.float64), 0.01, remedy="use more")


def test_samples_have_no_target():
    with pytest.raises(DocumentError, match="sampled have no KL"):
        TopK.make(tail="samples", max_kl=0.1)


@pytest.mark.parametrize("spec", [Codes(), TopK()])
def test_a_target_that_is_absent_changes_no_digest(spec):
    assert "max_kl" not in spec.to_mapping()
