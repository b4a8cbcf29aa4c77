"""Hidden states and a head in place of logits: what they make, and what the spectral codec makes of them."""

import pytest
import torch

from kdcache.codecs import Decoder, SpectralCodec, fitted_codec, measure, parameters_to
from kdcache.codecs.codes import CodesCodec
from kdcache.codecs.head_logits import Head, HeadLogits, concatenated, on_device, rows_of
from kdcache.codecs.spectral.hidden_rows import PreparedHead
from kdcache.documents import Codes, Spectral
from kdcache.errors import CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError

HELD = (1.0, 2.0, 4.0)
SCALES = torch.logspace(0, -1.5, 24)


def head(num_classes, *, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(num_classes, 24, generator=generator) * SCALES * 2
    return Head(weight.to(dtype), torch.randn(num_classes, generator=generator).to(dtype) if bias else None)


def hidden(num_rows, *, seed=0, dtype=torch.float32):
    return torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fitted(spec, pilot):
    codec, parameters = fitted_codec(spec, pilot.shape[1], pilot)
    return Decoder(codec, parameters_to(parameters, "cpu"))


WIDE = 6000  # above what is measured in float64


@pytest.fixture(autouse=True, scope="module")
def _in_16_bits():
    """Let products be of 16 bits on any processor, so that what they round is tested; some only imitate them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            patch.setattr(torch.cpu, name, lambda: True, raising=False)
        yield


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def wide(request):
    """A head of many classes, in either precision, and a decoder fitted to hidden states before it."""
    the_head = head(WIDE, dtype=request.param, bias=True)
    return the_head, fitted(Spectral(max_kl=0.02), HeadLogits(hidden(200, dtype=request.param), the_head))


def test_indexing_makes_the_logits_of_rows_and_classes():
    logits = HeadLogits(hidden(5), head(9, bias=True))
    made = hidden(5) @ head(9).weight.T + head(9, bias=True).bias
    assert torch.allclose(logits[:], made)
    assert torch.allclose(logits[1:3, slice(4, 9)], made[1:3, 4:9])


def test_rows_stay_hidden_until_they_are_asked_for():
    logits = HeadLogits(hidden(5), head(9))
    assert torch.equal(rows_of(logits, slice(2, 4)).hidden, logits.hidden[2:4])
    assert torch.equal(concatenated([logits.rows(slice(0, 2)), logits.rows(slice(2, 5))]).hidden, logits.hidden)
    assert on_device(logits, "cpu") is logits


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(ShapeError, match="24 components"):
        HeadLogits(torch.zeros(3, 5), head(9))


def test_a_head_without_class_axis_is_refused():
    with pytest.raises(ShapeError, match="class, component"):
        Head(torch.zeros(3))


def test_a_bias_of_other_classes_is_refused():
    with pytest.raises(ShapeError, match="9 classes"):
        Head(torch.zeros(9, 2), torch.zeros(3))


def test_codes_from_hidden_states_decode_to_the_logits(wide):
    the_head, decoder = wide
    rows = HeadLogits(hidden(300, seed=1, dtype=the_head.weight.dtype), the_head)
    divergence = measure(rows[:], decoder.decode(decoder.encode_measured(rows)[0]), HELD)
    assert divergence.mean(dim=0).amax() <= 0.02
    assert divergence.amax() <= 0.04


def test_the_target_is_used_up(wide):
    the_head, decoder = wide
    rows = HeadLogits(hidden(300, seed=1, dtype=the_head.weight.dtype), the_head)
    divergence = measure(rows[:], decoder.decode(decoder.encode_measured(rows)[0]), HELD)
    assert divergence.mean(dim=0).amax() >= 0.7 * 0.02


def test_hidden_states_and_their_logits_give_nearly_the_same_codes(wide):
    the_head, decoder = wide
    rows = HeadLogits(hidden(300, seed=1, dtype=the_head.weight.dtype), the_head)
    codes, made = decoder.encode_measured(rows)[0].int(), decoder.encode(rows[:]).int()
    assert float((codes == made).float().mean()) > 0.9


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_what_is_measured_from_hidden_states_is_so(wide, seed, scale):
    the_head, decoder = wide
    rows = HeadLogits(scale * hidden(100, seed=seed, dtype=the_head.weight.dtype), the_head)
    codes, errors = decoder.encode_measured(rows)
    decoded, logits = decoder.decode(codes), rows[:]
    divergence = measure(logits, decoded, HELD)
    assert bool((divergence <= errors.kl_ceiling + 1e-6).all())
    assert torch.allclose(errors.kl.mean(dim=0), divergence.mean(dim=0), rtol=0.05, atol=2e-6)
    assert torch.allclose(errors.lowest_logit, logits.amin(dim=1), rtol=0.01, atol=0.02)
    assert torch.allclose(errors.highest_logit, logits.amax(dim=1), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 4.0, 12.0])
def test_no_bound_from_hidden_states_is_violated(wide, seed, scale):
    the_head, decoder = wide
    rows = HeadLogits(scale * hidden(100, seed=seed, dtype=the_head.weight.dtype), the_head)
    codes, errors = decoder.encode_measured(rows)
    logits, decoded = rows[:].double(), decoder.decode(codes).double()
    error = decoded - logits
    assert bool((errors.error_range >= error.amax(dim=1) - error.amin(dim=1)).all())
    for temperatures, place in (((1.0, 1.5, 2.0), 0), ((2.0, 3.0, 4.0), 1), ((4.0, 8.0, 20.0), 2)):
        divergence = measure(logits, decoded, temperatures) * torch.tensor(temperatures).square()
        assert bool((divergence <= errors.scaled_bounds[:, place, None]).all())


def test_errors_of_stored_codes_are_those_found_when_encoding(wide):
    the_head, decoder = wide
    rows = HeadLogits(hidden(60, seed=3, dtype=the_head.weight.dtype), the_head)
    codes, errors = decoder.encode_measured(rows)
    again = decoder.row_errors(rows, codes)
    assert torch.allclose(again.kl.mean(dim=0), errors.kl.mean(dim=0), rtol=0.05)
    assert bool((errors.kl <= again.kl_ceiling + 1e-6).all())


def test_rows_unlike_the_pilot_are_held_to_the_target(wide):
    """The basis spans all that a head can give, whatever the pilot showed of it."""
    the_head, _ = wide
    narrow = hidden(200, dtype=the_head.weight.dtype)
    narrow[:, 12:] = 0
    decoder = fitted(Spectral(max_kl=0.02), HeadLogits(narrow, the_head))
    rows = HeadLogits(hidden(50, seed=5, dtype=the_head.weight.dtype), the_head)
    divergence = measure(rows[:], decoder.decode(decoder.encode_measured(rows)[0]), HELD)
    assert divergence.mean(dim=0).amax() <= 0.02
    assert divergence.amax() <= 0.04


@pytest.mark.parametrize("num_classes", [10, 300])
@pytest.mark.parametrize("spec", [Spectral(max_kl=0.01), Spectral(max_kl=1e-4), Spectral(step=0.01)], ids=repr)
def test_few_classes_and_small_targets_are_measured_exactly(spec, num_classes):
    pilot = HeadLogits(hidden(200), head(num_classes))
    decoder = fitted(spec, pilot)
    codes, errors = decoder.encode_measured(pilot)
    assert torch.allclose(errors.kl, measure(pilot[:], decoder.decode(codes), HELD), rtol=1e-4, atol=1e-9)


def test_a_cut_rank_is_measured_on_logits_that_are_made():
    """What a cut basis leaves out is no noise of the codes, so that it is found in the logits alone."""
    the_head = head(WIDE)
    decoder = fitted(Spectral(step=0.05, rank=6), HeadLogits(hidden(200), the_head))
    rows = HeadLogits(hidden(50, seed=1), the_head)
    codes, errors = decoder.encode_measured(rows)
    assert torch.allclose(errors.kl, measure(rows[:], decoder.decode(codes), HELD), rtol=0.01, atol=1e-5)


def test_a_class_that_the_bias_masks_stays_masked():
    bias = torch.zeros(WIDE)
    bias[:50] = -torch.inf
    the_head = Head(head(WIDE).weight, bias)
    decoder = fitted(Spectral(max_kl=0.02), HeadLogits(hidden(200), the_head))
    rows = HeadLogits(hidden(40, seed=1), the_head)
    decoded = decoder.decode(decoder.encode_measured(rows)[0])
    assert torch.equal(decoded == -torch.inf, (bias == -torch.inf).expand_as(decoded))
    assert measure(rows[:], decoded, HELD).amax() <= 0.04


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_hidden_state_that_is_no_number_is_refused_by_row(wide, value):
    the_head, decoder = wide
    states = hidden(9, dtype=the_head.weight.dtype)
    states[6, 2] = value
    with pytest.raises(NonFiniteLogitsError, match="Row 6"):
        decoder.encode_measured(HeadLogits(states, the_head))


@pytest.mark.parametrize(("part", "value"), [("weight", torch.nan), ("weight", -torch.inf), ("bias", torch.inf)])
def test_a_head_that_holds_no_numbers_is_refused_by_class(part, value):
    the_head = head(50, bias=True)
    getattr(the_head, part)[7] = value
    with pytest.raises(NonFiniteLogitsError, match="class 7"):
        fitted(Spectral(max_kl=0.02), HeadLogits(hidden(100), the_head))


def test_a_head_of_another_class_count_is_refused(wide):
    _, decoder = wide
    with pytest.raises(WrongClassCountError, match="6000 classes"):
        decoder.encode_measured(HeadLogits(hidden(3), head(7)))


def test_a_codec_that_needs_logits_says_so():
    logits = HeadLogits(hidden(8), head(9))
    codec = CodesCodec(Codes(), 9)
    decoder = Decoder(codec, parameters_to(codec.fit(logits[:]), "cpu"))
    with pytest.raises(TypeError, match="CodesCodec needs logits"):
        decoder.encode_measured(logits)


def test_a_head_fits_the_same_fidelity_as_its_logits():
    """Both ways in reach the target with nearly the same bytes: here, entropy of the codes."""
    the_head = head(WIDE)
    pilot, rows = HeadLogits(hidden(400), the_head), HeadLogits(hidden(200, seed=1), the_head)
    sizes = []
    for given in (pilot, pilot[:]):
        codes = fitted(Spectral(max_kl=0.02), given).encode(rows[:]).int()
        counts = [column.unique(return_counts=True)[1] / len(codes) for column in codes.T]
        sizes.append(sum(float(-(share * share.log2()).sum()) for share in counts))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)


def test_spectral_is_the_codec_that_measures_itself():
    assert isinstance(fitted(Spectral(max_kl=0.01), hidden(64) @ head(40).weight.T).codec, SpectralCodec)


def held(decoder, rows):
    """The largest and the mean KL of rows of hidden states that were encoded and decoded."""
    divergence = measure(rows[:], decoder.decode(decoder.encode_measured(rows)[0]), HELD)
    return float(divergence.amax()), float(divergence.mean(dim=0).amax())


def test_finer_hidden_states_than_the_head_keep_their_precision():
    the_head = head(WIDE, dtype=torch.bfloat16)
    decoder = fitted(Spectral(max_kl=0.02), HeadLogits(hidden(200), the_head))
    largest, mean = held(decoder, HeadLogits(3 * hidden(200, seed=1), the_head))
    assert largest <= 0.04
    assert mean <= 0.02


def test_products_in_bfloat16_are_measured_as_they_are_read():
    the_head = head(WIDE)
    decoder = fitted(Spectral(max_kl=0.02, precision="bfloat16"), HeadLogits(hidden(200), the_head))
    largest, mean = held(decoder, HeadLogits(hidden(100, seed=1), the_head))
    assert largest <= 0.04
    assert mean <= 0.02


def test_a_class_far_above_the_likely_ones_is_measured():
    """The pilot never sees the last classes; a row in which one of them leads by more than float32 can exponentiate."""
    the_head = head(WIDE)
    the_head.weight[-1] = 0
    the_head.weight[-1, 3] = 900.0
    states = hidden(200)
    states[:, 3] = -states[:, 3].abs()
    decoder = fitted(Spectral(max_kl=0.02), HeadLogits(states, the_head))
    rows = hidden(60, seed=2)
    rows[:, 3] = rows[:, 3].abs()
    largest, _ = held(decoder, HeadLogits(rows, the_head))
    assert largest <= 0.04


def test_another_basis_is_not_taken_for_the_last_one():
    the_head = head(WIDE)
    pilot = HeadLogits(hidden(200), the_head)
    first, second = (fitted(Spectral(max_kl=0.02, rank=rank), pilot) for rank in (None, 24))
    for decoder in (first, second, first):
        largest, _ = held(decoder, HeadLogits(hidden(50, seed=1), the_head))
        assert largest <= 0.04


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_heads_of_other_types_serve(dtype):
    the_head = head(WIDE, dtype=dtype, bias=True)
    decoder = fitted(Spectral(max_kl=0.02), HeadLogits(hidden(200, dtype=dtype), the_head))
    largest, mean = held(decoder, HeadLogits(hidden(100, seed=1, dtype=dtype), the_head))
    assert largest <= 0.04
    assert mean <= 0.02


@pytest.mark.parametrize("num_rows", [0, 1])
def test_any_number_of_rows_is_coded(wide, num_rows):
    the_head, decoder = wide
    codes, errors = decoder.encode_measured(HeadLogits(hidden(num_rows, dtype=the_head.weight.dtype), the_head))
    assert len(codes) == len(errors.kl) == num_rows


# Heads and rows that are hard to measure ------------------------------------------------------------------------------

HARD = 6000


def held_to(target, rows, pilot):
    """Fit, encode, and measure against logits in float64; the ceilings that the guard trusted hold."""
    decoder = fitted(Spectral(max_kl=target), pilot)
    codes, errors = decoder.encode_measured(rows)
    true = rows.hidden.double() @ rows.head.weight.double().T
    if rows.head.bias is not None:
        true += rows.head.bias.double()
    divergence = measure(true, decoder.decode(codes).double(), HELD)
    assert divergence.mean(dim=0).amax() <= target
    assert divergence.amax() <= 2 * target
    assert bool((divergence <= errors.kl_ceiling * 1.001 + 1e-6).all())
    difference = decoder.decode(codes).double() - true
    assert bool((difference.amax(dim=1) - difference.amin(dim=1) <= errors.error_range + 1e-3).all())


@pytest.mark.parametrize("shrunk_in_the_pilot", [1.0, 0.0], ids=["seen", "unseen"])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
def test_a_huge_column_of_the_head_hides_no_other(size, shrunk_in_the_pilot):
    the_head, states = head(HARD), hidden(500)
    the_head.weight[:, 0] *= size
    states[:, 0] /= size
    states[:300, 0] *= shrunk_in_the_pilot
    held_to(0.02, HeadLogits(states[300:], the_head), HeadLogits(states[:300], the_head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opposite_columns_of_the_head_cancel(dtype):
    the_head, states = head(HARD, dtype=dtype), hidden(500, dtype=dtype)
    the_head.weight[:, 0] *= 1000
    the_head.weight[:, 1] = the_head.weight[:, 0]
    states[:, 1] = -states[:, 0]
    held_to(0.02, HeadLogits(states[300:], the_head), HeadLogits(states[:300], the_head))


@pytest.mark.parametrize("offset", [-100.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_that_all_logits_share_changes_nothing(dtype, offset):
    plain = head(HARD, dtype=dtype)
    the_head = Head(plain.weight, torch.full((HARD,), offset, dtype=dtype))
    states = hidden(500, dtype=dtype)
    held_to(0.02, HeadLogits(states[300:], the_head), HeadLogits(states[:300], the_head))


@pytest.mark.parametrize("scale", [5.0, 50.0])
def test_rows_whose_soft_targets_are_nearly_hard_are_measured(scale):
    plain = head(HARD)
    the_head, states = Head(plain.weight * scale), hidden(500)
    held_to(0.02, HeadLogits(states[300:], the_head), HeadLogits(states[:300], the_head))


def test_a_row_far_above_the_others_is_held_too():
    the_head, states = head(HARD), hidden(500)
    states[400] *= 1e4
    held_to(0.02, HeadLogits(states[300:], the_head), HeadLogits(states[:300], the_head))


def test_a_row_beyond_float32_is_refused_by_name():
    the_head, states = head(HARD), hidden(500)
    states[400] *= 1e25
    decoder = fitted(Spectral(max_kl=0.02), HeadLogits(states[:300], the_head))
    with pytest.raises(CodecError, match="Row 100 cannot be coded"):
        decoder.encode_measured(HeadLogits(states[300:], the_head))


def test_another_head_than_the_pilots_is_refused_or_measured():
    """Its logits lie outside the basis, which no step mends."""
    pilot = HeadLogits(hidden(300), head(HARD))
    decoder = fitted(Spectral(max_kl=0.02), pilot)
    torch.manual_seed(77)
    other = Head(pilot.head.weight + 0.3 * torch.randn(pilot.head.weight.shape))
    with pytest.raises(CodecError, match="cannot be coded"):
        decoder.encode_measured(HeadLogits(hidden(50, seed=4), other))
    plain = fitted(Spectral(step=0.05), pilot)
    rows = HeadLogits(hidden(50, seed=4), other)
    codes, errors = plain.encode_measured(rows)
    assert torch.allclose(errors.kl, measure(rows[:], plain.decode(codes), HELD), rtol=1e-3)


def test_what_lies_outside_the_basis_is_bounded_row_by_row():
    pilot = HeadLogits(hidden(300), head(HARD))
    decoder = fitted(Spectral(max_kl=0.02), pilot)
    parameters = decoder.codec.prepare_to_encode(decoder.parameters)
    prepared = PreparedHead.of(pilot.head, parameters)
    states = torch.cat([hidden(50, seed=8), 100 * hidden(50, seed=9)])
    kept = prepared.coordinates(states) @ parameters["basis"].double() + parameters["mean"]
    true = states.double() @ pilot.head.weight.double().T
    outside = (kept - (true - true.mean(dim=1, keepdim=True))).abs().amax(dim=1)
    most, likely, _ = prepared.outside(states)
    assert bool((outside <= most + 1e-6).all())
    assert bool((likely <= most).all())
