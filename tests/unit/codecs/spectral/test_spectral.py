"""The spectral codec: what it keeps, what it promises, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.codecs import Decoder, SpectralCodec, codec_for, fitted_codec, measure, parameters_to
from kdcache.codecs.divergence import divergences
from kdcache.codecs.spectral.zigzag import scaled
from kdcache.documents import Spectral
from kdcache.errors import CodecError, DocumentError, NonFiniteLogitsError, WrongClassCountError

TARGETS = (0.02, 0.005, 1e-4)
HELD = (1.0, 2.0, 4.0)


def bell(num_rows, num_hidden, num_classes, *, seed=0, scale=1.0):
    """Logits of a network with so many hidden units: bell-shaped hidden states through one head."""
    head = torch.randn(num_hidden, num_classes, generator=torch.Generator().manual_seed(7))
    hidden = torch.randn(num_rows, num_hidden, generator=torch.Generator().manual_seed(seed))
    return scale * (hidden @ head) * 3 / num_hidden**0.5


def fitted(spec, pilot):
    codec, parameters = fitted_codec(spec, pilot.shape[1], pilot)
    return Decoder(codec, parameters_to(parameters, "cpu"))


PILOT = bell(400, 12, 300)
LATER = bell(300, 12, 300, seed=1)


def test_the_rank_is_found_from_the_pilot():
    assert fitted(Spectral(max_kl=0.01), PILOT).codec.spec.rank == 12


def test_a_given_rank_cuts_the_basis():
    assert fitted(Spectral(step=0.1, rank=5), PILOT).parameters["basis"].shape == (5, 300)


def test_a_row_takes_one_column_a_component_and_one_for_its_level():
    assert fitted(Spectral(max_kl=0.01), PILOT).encode(LATER).shape == (300, 13)


@pytest.mark.parametrize("target", TARGETS)
def test_the_mean_over_the_rows_meets_the_target(target):
    decoder = fitted(Spectral(max_kl=target), PILOT)
    assert measure(LATER, decoder.decode(decoder.encode(LATER)), HELD).mean(dim=0).amax() <= target


@pytest.mark.parametrize("target", TARGETS)
def test_no_row_exceeds_twice_the_target(target):
    decoder = fitted(Spectral(max_kl=target), PILOT)
    assert measure(LATER, decoder.decode(decoder.encode(LATER)), HELD).amax() <= 2 * target


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_is_used_up_where_rows_are_like_the_pilots(target):
    decoder = fitted(Spectral(max_kl=target), PILOT)
    assert measure(LATER, decoder.decode(decoder.encode(LATER)), HELD).mean(dim=0).amax() >= 0.7 * target


@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_the_target_holds_when_the_domain_shifts(scale):
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    shifted = bell(200, 12, 300, seed=2, scale=scale) + scale
    divergence = measure(shifted, decoder.decode(decoder.encode(shifted)), HELD)
    assert divergence.mean(dim=0).amax() <= 0.01
    assert divergence.amax() <= 0.02


def test_a_fixed_step_is_that_of_every_row():
    decoder = fitted(Spectral(step=0.05), PILOT)
    levels = decoder.encode(LATER)[:, -1].int()
    assert decoder.parameters["steps"][levels].unique().tolist() == [pytest.approx(0.05)]


def test_a_smaller_step_is_more_faithful():
    errors = [
        float(measure(LATER, decoder.decode(decoder.encode(LATER)), [1.0]).mean())
        for decoder in (fitted(Spectral(step=step), PILOT) for step in (1e-3, 4e-3))
    ]
    assert errors[0] < errors[1] / 4


def test_rows_outside_the_pilots_span_are_refused_under_a_target():
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    other = torch.randn(4, 300, generator=torch.Generator().manual_seed(3)) * 3
    with pytest.raises(CodecError, match="Codes"):
        decoder.encode(other)


def test_bfloat16_products_meet_the_target_too():
    decoder = fitted(Spectral(max_kl=0.02, precision="bfloat16"), PILOT)
    divergence = measure(LATER, decoder.decode(decoder.encode(LATER)), HELD)
    assert divergence.mean(dim=0).amax() <= 0.02
    assert divergence.amax() <= 0.04


def test_a_class_masked_in_every_row_of_the_pilot_stays_masked():
    masked = torch.arange(300) < 3
    decoder = fitted(Spectral(max_kl=0.01), PILOT.masked_fill(masked, -torch.inf))
    decoded = decoder.decode(decoder.encode(LATER.masked_fill(masked, -torch.inf)))
    assert torch.equal(decoded == -torch.inf, masked.expand_as(decoded))


def test_a_row_that_masks_other_classes_is_refused_by_number():
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    rows = LATER.clone()
    rows[7, 3] = -torch.inf
    with pytest.raises((CodecError, NonFiniteLogitsError), match="Row 7"):
        decoder.encode(rows)


class Picked(TorchDispatchMode):
    """Notes the shape of everything that is picked out of a tensor by index, which copies it."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in {torch.ops.aten.index, torch.ops.aten.index_select}:
            self.shapes.append(tuple(result.shape))
        return result


def picked_to_encode_again(masked):
    decoder = fitted(Spectral(max_kl=0.01), PILOT.masked_fill(masked, -torch.inf))
    rows = LATER.masked_fill(masked, -torch.inf)
    decoder.encode(rows)
    with Picked() as picked:
        decoder.encode(rows)
    return picked.shapes


@pytest.mark.parametrize("last", [3, 150], ids=["masked from the first on", "masked in the middle"])
def test_the_basis_without_masked_classes_is_made_once(last):
    masked = (torch.arange(300) < last) & (torch.arange(300) >= last - 3)
    assert (12, 297) not in picked_to_encode_again(masked)


def test_classes_that_stand_together_are_taken_from_the_logits_without_a_copy():
    assert (300, 297) not in picked_to_encode_again(torch.arange(300) >= 297)
    assert (300, 297) in picked_to_encode_again(torch.arange(300) % 100 == 50)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_without_soft_targets_is_refused_by_number(value):
    rows = LATER.clone()
    rows[5, 1] = value
    with pytest.raises(NonFiniteLogitsError, match="Row 5"):
        fitted(Spectral(max_kl=0.01), PILOT).encode(rows)


def test_logits_of_another_class_count_are_refused():
    with pytest.raises(WrongClassCountError, match="300 classes"):
        fitted(Spectral(max_kl=0.01), PILOT).encode(LATER[:, :10])


def test_the_fill_code_is_never_written():
    decoder = fitted(Spectral(max_kl=1e-4), PILOT)
    assert int(decoder.encode(bell(200, 12, 300, seed=4, scale=5)).int().max()) < 65535


def test_a_hole_is_recognised():
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    codes = decoder.encode(LATER[:3]).int()
    codes[1] = 65535
    assert decoder.codec.is_fill(codes.to(torch.uint16)).tolist() == [False, True, False]


def test_a_hole_decodes_to_nan():
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    holes = torch.full((1, 13), 65535).to(torch.uint16)
    assert decoder.decode(holes).isnan().all()


def test_encoding_twice_gives_the_same_codes():
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    assert torch.equal(decoder.encode(LATER).int(), decoder.encode(LATER).int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_logits_of_any_floating_point_type_are_coded(dtype):
    decoder = fitted(Spectral(max_kl=0.01), bell(600, 12, 40).to(dtype))
    rows = bell(100, 12, 40, seed=1).to(dtype)
    assert measure(rows.double(), decoder.decode(decoder.encode(rows)).double(), HELD).mean(dim=0).amax() <= 0.0101


@pytest.mark.parametrize(
    "pilot",
    [torch.ones(32, 6), torch.eye(8).repeat(8, 1) * 1e4, torch.randn(1, 6).repeat(32, 1)],
    ids=["constant", "one-hot", "one row"],
)
def test_degenerate_pilots_are_coded_exactly_enough(pilot):
    decoder = fitted(Spectral(max_kl=0.01), pilot)
    assert measure(pilot, decoder.decode(decoder.encode(pilot)), HELD).amax() <= 0.02


def test_a_pilot_of_few_rows_is_refused():
    with pytest.raises(CodecError, match="at least 8"):
        fitted_codec(Spectral(), 300, PILOT[:7])


def test_a_target_and_a_step_exclude_each_other():
    with pytest.raises(DocumentError, match="exclude each other"):
        Spectral.make(max_kl=0.1, step=0.1)


def test_columns_are_known_only_with_a_rank():
    with pytest.raises(CodecError, match="fitted"):
        codec_for(Spectral(max_kl=0.01), 300)


ALTERED = {
    "a missing mean": (lambda p: p.pop("mean"), "needs the parameters"),
    "a step of 0": (lambda p: p["steps"].zero_(), "descending"),
    "a NaN in the basis": (lambda p: p["basis"].fill_(torch.nan), "NaN"),
    "another basis": (lambda p: p.update(basis=p["basis"][:3]), "needs the parameters"),
}


@pytest.mark.parametrize(("alter", "said"), ALTERED.values(), ids=ALTERED)
def test_altered_parameters_are_refused(alter, said):
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    parameters = {name: value.clone() for name, value in decoder.parameters.items()}
    alter(parameters)
    with pytest.raises(CodecError, match=said):
        Decoder(decoder.codec, parameters)


def test_a_memory_map_serves_as_pilot(tmp_path):
    np.save(tmp_path / "pilot.npy", PILOT.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "pilot.npy", mmap_mode="r+"))
    _, parameters = fitted_codec(Spectral(max_kl=0.01), 300, mapped)
    _, expected = fitted_codec(Spectral(max_kl=0.01), 300, PILOT)
    assert np.array_equal(parameters["basis"], expected["basis"])


def test_a_stranger_decodes_with_the_stored_parameters_alone():
    decoder = fitted(Spectral(max_kl=0.01), PILOT)
    codes = decoder.encode(LATER).numpy().astype(np.int64)
    stored = {name: value.numpy().astype(np.float32) for name, value in decoder.parameters.items()}
    whole = (codes[:, :-1] >> 1) ^ -(codes[:, :-1] & 1)
    logits = stored["mean"] + (whole * stored["steps"][codes[:, -1:]]) @ stored["basis"]
    assert np.allclose(logits, decoder.decode(decoder.encode(LATER)).numpy(), atol=1e-4)


def test_the_axes_diagonalise_the_metric_of_kl():
    """Noise of one variance along any axis costs the pilot's soft targets, on average, about the same KL."""
    pilot = bell(2000, 12, 300)
    parameters = fitted(Spectral(step=1.0), pilot).parameters
    basis = parameters["basis"].double()
    total = torch.zeros(12, 12, dtype=torch.float64)
    for temperature in HELD:
        p = torch.softmax(pilot.double() / temperature, dim=1)
        expected = p @ basis.T
        total += ((basis * p.mean(dim=0)) @ basis.T - expected.T @ expected / len(p)) / temperature**2
    scaled = total / total.diagonal().mean()
    assert torch.allclose(scaled, torch.eye(12, dtype=torch.float64), atol=0.1)


def test_the_quick_divergence_is_the_measured_one():
    logits = bell(20, 16, 5000)
    decoded = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) + 5
    assert torch.allclose(divergences(logits, decoded), measure(logits, decoded, HELD), atol=3e-6)


def test_a_codec_that_is_fitted_again_has_its_rank():
    codec = SpectralCodec(Spectral(max_kl=0.01, rank=12), 300)
    assert codec.fit(PILOT)["basis"].shape == (12, 300)


def test_a_pilot_that_shows_fewer_components_than_the_rank_is_refused():
    with pytest.raises(CodecError, match="12 components, fewer than rank=20"):
        SpectralCodec(Spectral(max_kl=0.01, rank=20), 300).fit(PILOT)


def test_autocast_changes_nothing():
    decoder = fitted(Spectral(max_kl=1e-4), PILOT)
    codes = decoder.encode(LATER)
    expected = decoder.decode(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder.encode(LATER).int(), codes.int())
        assert torch.equal(decoder.decode(codes), expected)


def test_a_pilot_of_hugely_negative_logits_is_refused_with_a_remedy():
    pilot = torch.where(torch.rand(64, 40, generator=torch.Generator().manual_seed(0)) < 0.1, -3e38, 1.0)
    with pytest.raises(CodecError, match="Codes"):
        fitted_codec(Spectral(max_kl=0.01), 40, pilot)


def test_no_rows_give_no_codes():
    assert fitted(Spectral(max_kl=0.01), PILOT).encode(LATER[:0]).shape == (0, 13)


@pytest.mark.parametrize("value", [3e38, 1e39, 1e300])
def test_rows_beyond_float32_are_refused_by_number_with_a_fixed_step_too(value):
    decoder = fitted(Spectral(step=0.05), PILOT)
    logits = LATER[:3].double()
    logits[1, ::2], logits[1, 1::2] = value, -value
    with pytest.raises(CodecError, match="Row 1 lies more than 32766 steps along a component"):
        decoder.encode(logits)


def test_fitting_knows_no_autocast():
    expected = fitted(Spectral(max_kl=0.01), PILOT).parameters
    with torch.autocast("cpu", torch.bfloat16):
        found = fitted(Spectral(max_kl=0.01), PILOT).parameters
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_refusal_of_a_cut_rank_tells_the_error_that_is_left():
    with pytest.raises(CodecError, match=r"Row \d+ cannot be coded with max_kl=0.001: .* its KL is still") as refused:
        fitted(Spectral(max_kl=0.001, rank=9), PILOT).encode(LATER)
    row, told = re.search(r"Row (\d+) .* still ([\d.e-]*\d)", str(refused.value)).groups()
    finest = fitted(Spectral(step=1e-3, rank=9), PILOT)
    left = measure(LATER, finest.decode(finest.encode(LATER)), HELD).amax(dim=1)
    assert float(told) == pytest.approx(float(left[int(row)]), rel=0.05)
    assert int(row) == int(left.argmax())


@pytest.mark.parametrize("num_rows", [0, 1, 255, 256, 300])
def test_coordinates_in_blocks_are_those_of_all_rows_at_once(num_rows):
    codes = torch.arange(num_rows * 7, dtype=torch.int32).mul(997).remainder(65534).view(num_rows, 7)
    bits = codes.to(torch.uint16).view(torch.int16)
    steps = torch.rand(num_rows, 1, generator=torch.Generator().manual_seed(0))
    numbers = torch.where(codes % 2 == 0, codes // 2, -(codes + 1) // 2)
    assert torch.equal(scaled(bits, steps), numbers * steps)


@pytest.mark.parametrize("scale", [0.3, 0.6])
def test_a_shard_unlike_the_pilot_uses_its_target_up(scale):
    decoder = fitted(Spectral(max_kl=0.02), PILOT)
    rows = bell(2048, 12, 300, seed=2, scale=scale)
    assert 0.93 * 0.02 < measure(rows, decoder.decode(decoder.encode(rows)), HELD).mean(dim=0).amax() <= 0.02
