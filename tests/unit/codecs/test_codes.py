"""The codes codec: nearest levels, exact maxima, no clipping, holes that show."""

import re

import numpy as np
import pytest
import torch

from kdcache.codecs import CodesCodec, Decoder, error_range, measure, parameters_to
from kdcache.documents import Codes
from kdcache.errors import CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError

SPECS = [
    Codes(dtype="uint8", spacing="uniform"),
    Codes(dtype="uint8", spacing="companded"),
    Codes(dtype="uint16", spacing="uniform"),
    Codes(dtype="uint16", spacing="companded"),
]


def sampled(num_rows=64, num_classes=20, scale=4.0, seed=0):
    return torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed)) * scale


def fitted(spec, logits):
    codec = CodesCodec(spec, logits.shape[1])
    return codec, parameters_to(codec.fit(logits), "cpu")


def uniform(step, num_classes):
    """A uniform uint8 codec with a step of the test's choosing."""
    codebook = torch.arange(255, dtype=torch.float32) * step
    parameters = {"codebook": codebook, "coefficients": torch.tensor([step, 0.0])}
    return CodesCodec(Codes(spacing="uniform"), num_classes), parameters


def test_a_gap_gets_the_code_of_the_nearest_level():
    codec, parameters = uniform(0.5, 5)
    codes = codec.encode(torch.tensor([[7.0, 6.5, 6.3, 6.2, 0.0]]), parameters)
    assert codes.tolist() == [[0, 1, 1, 2, 14, 0]]


def test_decoding_gives_minus_the_gaps():
    codec, parameters = uniform(0.5, 3)
    assert codec.decode(torch.tensor([[0, 1, 14, 0]], dtype=torch.uint8), parameters).tolist() == [[0.0, -0.5, -7.0]]


@pytest.mark.parametrize(("widths", "exponent"), [(1.0, 0), (1.001, 1), (2.0, 1), (2.001, 2), (2.0**30, 30)])
def test_the_exponent_is_the_smallest_that_fits_the_widest_gap(widths, exponent):
    codec, parameters = uniform(2.0**-28, 2)
    codes = codec.encode(-widths * torch.tensor([[0.0, 254 * 2.0**-28]]), parameters)
    assert codes[0, -1].item() == exponent


def test_a_row_wider_than_the_codebook_is_scaled_and_never_clipped():
    codec, parameters = uniform(0.5, 3)
    decoded = codec.decode(codec.encode(torch.tensor([[0.0, -500.0, -1016.0]]), parameters), parameters)
    assert decoded.tolist() == [[0.0, -500.0, -1016.0]]


def test_a_row_beyond_every_exponent_is_refused_with_its_width():
    codec, parameters = uniform(2.0**-29, 2)
    with pytest.raises(CodecError, match=r"Row 1 spans 600 logits.*; this codebook reaches 508 at most"):
        codec.encode(torch.tensor([[0.0, 1.0], [0.0, -600.0]]), parameters)


@pytest.mark.parametrize("masked", [-1100.0, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_masked_class_is_refused_by_row_gap_class_and_remedies(masked):
    codec, parameters = uniform(0.5, 3)
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, masked, 4.0]])
    message = (
        rf"Row 1 spans {re.escape(f'{5 - masked:.6g}')} logits, from class 0 down to class 1; "
        r"uint8 codes reach 1016 at most.*"
        r"left out of the teacher's head.*uint16.*reach 262,136, or Lossless\(\)\. Nothing was encoded"
    )
    with pytest.raises(CodecError, match=message):
        codec.encode(logits, parameters)


@pytest.mark.parametrize("spec", SPECS)
def test_a_pilot_with_a_masked_class_is_refused(spec):
    with pytest.raises(CodecError, match=r"Row 0 spans 1e\+09 logits, from class 0 down to class 1"):
        CodesCodec(spec, 2).fit(torch.tensor([[0.0, -1e9]]))


def test_sixteen_bits_offer_only_what_is_finer_still():
    codec, parameters = fitted(Codes(dtype="uint16"), sampled())
    with pytest.raises(CodecError, match=r"uint16 codes reach 262136 at most.* or use Lossless\(\)"):
        codec.encode(torch.full((1, 20), -1e9).index_fill(1, torch.tensor(0), 0.0), parameters)


def test_a_row_of_a_later_block_is_named_by_its_place_in_the_batch():
    codec, parameters = uniform(0.5, 100_000)
    logits = torch.zeros(7, 100_000)
    logits[5, 3] = -2000.0
    with pytest.raises(CodecError, match="Row 5 spans 2000 logits, from class 0 down to class 3"):
        codec.encode(logits, parameters)


def test_an_infinite_logit_of_a_later_block_is_named_by_its_place_in_the_batch():
    codec, parameters = uniform(0.5, 100_000)
    logits = torch.zeros(7, 100_000)
    logits[6, 3] = float("-inf")
    with pytest.raises(NonFiniteLogitsError, match="Row 6 of the logits"):
        codec.encode(logits, parameters)


@pytest.mark.parametrize(("dtype", "widest"), [("uint8", 1016.0), ("uint16", 262_136.0)])
def test_the_widest_row_that_is_coded_spans_four_logits_a_level(dtype, widest):
    codec, parameters = fitted(Codes(dtype=dtype), torch.tensor([[0.0, -widest]]))
    decoded = codec.decode(codec.encode(torch.tensor([[0.0, -widest]]), parameters), parameters)
    assert codec.widest_gap == widest
    assert decoded[0, 1].item() == pytest.approx(-widest, rel=0.01)


@pytest.mark.parametrize("masked", [-300.0, -1e4, -65_000.0])
def test_sixteen_bits_keep_the_soft_targets_beside_a_masked_class(masked):
    logits = sampled()
    logits[:, 7] = masked
    codec, parameters = fitted(Codes(dtype="uint16"), logits)
    decoded = codec.decode(codec.encode(logits, parameters), parameters)
    assert float(measure(logits, decoded).mean(0).amax()) < 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_with_their_row(value):
    codec, parameters = uniform(0.5, 2)
    with pytest.raises(NonFiniteLogitsError, match="Row 1 of the logits"):
        codec.encode(torch.tensor([[0.0, 1.0], [0.0, value]]), parameters)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_pilot_that_is_not_finite_is_refused_with_its_row(value):
    with pytest.raises(NonFiniteLogitsError, match="Row 1 of the logits"):
        CodesCodec(Codes(), 2).fit(torch.tensor([[0.0, 1.0], [0.0, value]]))


def test_an_empty_pilot_is_refused():
    with pytest.raises(CodecError, match="The pilot has no rows"):
        CodesCodec(Codes(), 2).fit(torch.empty(0, 2))


def test_a_pilot_of_absurd_width_is_refused():
    with pytest.raises(CodecError, match=r"Row 0 spans 1e\+30 logits"):
        CodesCodec(Codes(), 2).fit(torch.tensor([[0.0, 1e30]]))


@pytest.mark.parametrize("spec", SPECS)
def test_a_pilot_of_equal_logits_still_codes_ordinary_rows(spec):
    codec, parameters = fitted(spec, torch.zeros(4, 3))
    logits = torch.tensor([[0.0, -10.0, -20.0]])
    decoded = codec.decode(codec.encode(logits, parameters), parameters)
    torch.testing.assert_close(decoded, logits, atol=0.1, rtol=0.0)


@pytest.mark.parametrize("spec", SPECS)
def test_the_codebook_begins_at_zero_and_rises(spec):
    codebook = CodesCodec(spec, 20).fit(sampled())["codebook"]
    assert codebook[0] == 0
    assert (np.diff(codebook) > 0).all()


@pytest.mark.parametrize("spec", SPECS)
def test_all_codes_but_the_fill_have_a_level(spec):
    codec = CodesCodec(spec, 20)
    assert codec.fit(sampled())["codebook"].shape == (codec.fill,)


@pytest.mark.parametrize("spec", SPECS)
def test_arithmetic_decoding_equals_the_stored_codebook_bit_for_bit(spec):
    _, parameters = fitted(spec, sampled(scale=7.3))
    codebook = parameters["codebook"]
    every_code_then_exponent = np.append(np.arange(len(codebook)), 3).astype(spec.dtype)
    codes = torch.from_numpy(every_code_then_exponent)[None]
    assert torch.equal(CodesCodec(spec, len(codebook)).decode(codes, parameters)[0], codebook * -8)


@pytest.mark.parametrize("spec", SPECS)
def test_a_stranger_decodes_with_the_codebook_alone(spec):
    codec, parameters = fitted(spec, sampled())
    codes = codec.encode(sampled(seed=1), parameters)
    stored, codebook = codes.numpy(), parameters["codebook"].numpy()
    theirs = -codebook[stored[:, :-1]] * np.float32(2) ** stored[:, -1:]
    assert np.array_equal(theirs, codec.decode(codes, parameters).numpy())


@pytest.mark.parametrize("spec", SPECS)
def test_codes_have_the_stored_dtype_also_in_numpy(spec):
    codec, parameters = fitted(spec, sampled())
    assert codec.encode(sampled(), parameters).numpy().dtype == np.dtype(spec.dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_fitting_twice_gives_the_same_parameters(spec):
    first, second = (CodesCodec(spec, 20).fit(sampled()) for _ in range(2))
    assert {name: value.tobytes() for name, value in first.items()} == {
        name: value.tobytes() for name, value in second.items()
    }


def test_the_codebook_reaches_a_sixteenth_beyond_rows_of_equal_width():
    pilot = torch.tensor([[0.0, -3.0, -16.0], [5.0, 1.0, -11.0]])
    assert CodesCodec(Codes(), 3).fit(pilot)["codebook"][-1] == pytest.approx(17.0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_fused_and_separate_multiplication_and_addition_give_the_same_levels(dtype):
    fit = CodesCodec(Codes(dtype=dtype), 20).fit(sampled(scale=7.3))
    linear, quadratic = fit["coefficients"]
    assert quadratic > 0
    code = np.arange(len(fit["codebook"]))
    fused = (linear.astype(np.float64) + quadratic.astype(np.float64) * code).astype(np.float32)
    assert np.array_equal(fused * code.astype(np.float32), fit["codebook"])


def test_one_outlying_row_does_not_coarsen_the_others():
    pilot = sampled(num_rows=256)
    outlying = torch.cat([pilot, pilot[:1] * 50])
    width = CodesCodec(Codes(), 20).fit(outlying)["codebook"][-1]
    assert width < 1.2 * (pilot.amax(1) - pilot.amin(1)).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_floating_point_type_are_coded(dtype):
    codec, parameters = fitted(Codes(), sampled())
    logits = sampled().to(dtype)
    assert torch.equal(codec.encode(logits, parameters), codec.encode(logits.float(), parameters))


def test_float64_logits_far_from_zero_lose_nothing_to_their_shift():
    codec, parameters = fitted(Codes(dtype="uint16"), sampled())
    logits = (sampled().double() * 1024).round() / 1024
    assert torch.equal(codec.encode(logits + 2.0**40, parameters), codec.encode(logits, parameters))


@pytest.mark.parametrize("spec", SPECS)
def test_large_batches_are_coded_as_small_ones(spec):
    logits = sampled(num_rows=3, num_classes=100_000)
    codec, parameters = fitted(spec, logits)
    rows = [codec.encode(row[None], parameters) for row in logits]
    codes = codec.encode(logits, parameters)
    assert torch.equal(codes, torch.cat(rows))
    assert torch.equal(codec.decode(codes, parameters), torch.cat([codec.decode(row, parameters) for row in rows]))


@pytest.mark.parametrize("spec", SPECS)
def test_an_empty_batch_stays_empty(spec):
    codec, parameters = fitted(spec, sampled())
    codes = codec.encode(torch.empty(0, 20), parameters)
    assert codes.shape == (0, 21)
    assert codec.decode(codes, parameters).shape == (0, 20)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("column", [0, 19, 20])
def test_a_row_with_a_fill_code_in_any_column_is_a_hole(spec, column):
    codec, parameters = fitted(spec, sampled())
    codes = codec.encode(sampled(num_rows=3), parameters)
    codes[1, column] = codec.fill
    assert codec.is_fill(codes).tolist() == [False, True, False]


@pytest.mark.parametrize("spec", SPECS)
def test_a_hole_decodes_to_nan(spec):
    codec, parameters = fitted(spec, sampled())
    codes = codec.encode(sampled(num_rows=2), parameters)
    codes[1] = codec.fill
    assert codec.decode(codes, parameters).isnan().any(1).tolist() == [False, True]
    assert codec.decode(codes, parameters)[1].isnan().all()


@pytest.mark.parametrize("spec", SPECS)
def test_sixteen_bits_lose_less_than_1e7th_of_a_nat_and_eight_less_than_1e3rd(spec):
    codec, parameters = fitted(spec, sampled())
    decoded = codec.decode(codec.encode(sampled(), parameters), parameters)
    limit = {"uint8": 1e-3, "uint16": 1e-7}[spec.dtype]
    assert 0 < float(measure(sampled(), decoded).amax()) < limit


def test_companding_beats_uniform_levels_where_the_probability_is_and_hardly_loses_in_the_tail():
    logits = sampled(num_rows=256, num_classes=1000)
    divergences = {}
    for spec in SPECS[:2]:
        codec, parameters = fitted(spec, logits)
        decoded = codec.decode(codec.encode(logits, parameters), parameters)
        divergences[spec.spacing] = measure(logits, decoded, [1.0, 20.0]).mean(0)
    ratio = divergences["companded"] / divergences["uniform"]
    assert ratio[0] < 0.5
    assert ratio[1] < 1.5


@pytest.mark.parametrize("step", [0.5, 0.3])
def test_the_error_range_bound_of_uniform_levels_is_the_scaled_step(step):
    codec, parameters = uniform(step, 3)
    codes = torch.tensor([[0, 9, 14, 0], [0, 254, 14, 2]], dtype=torch.uint8)
    bound = codec.error_range_bound(codes, parameters)
    torch.testing.assert_close(bound, torch.tensor([step, step * 4]), rtol=1e-3, atol=0.0)


def test_the_error_range_bound_of_companded_levels_follows_the_levels_in_use():
    codec, parameters = fitted(Codes(), sampled())
    codes = torch.zeros(2, 21, dtype=torch.uint8)
    codes[1, 3] = 200
    codebook = parameters["codebook"]
    expected = torch.stack([codebook[1] / 2, (codebook[201] - codebook[199]) / 2])
    torch.testing.assert_close(codec.error_range_bound(codes, parameters), expected, rtol=1e-3, atol=0.0)


def test_the_error_range_bound_of_uniform_levels_is_attained():
    codec, parameters = uniform(0.5, 3)
    logits = torch.tensor([[0.0, -0.2499, -0.7501]])
    codes = codec.encode(logits, parameters)
    attained = error_range(logits, codec.decode(codes, parameters)) / codec.error_range_bound(codes, parameters)
    assert 0.99 < attained.item() <= 1


def test_the_error_range_bound_allows_for_gaps_rounded_to_float32():
    codec = CodesCodec(Codes(dtype="uint16", spacing="uniform"), 3)
    step = 2.0**-10
    codebook = torch.arange(65535, dtype=torch.float32) * step
    parameters = {"codebook": codebook, "coefficients": torch.tensor([step, 0.0])}
    top = 2.0**-20
    logits = torch.tensor([[top, -32 - step / 2, top - step / 2 - 2.0**-34]])
    codes = codec.encode(logits, parameters)
    measured = error_range(logits, codec.decode(codes, parameters)).item()
    assert step < measured <= codec.error_range_bound(codes, parameters).item()


def test_another_class_count_is_refused():
    codec, parameters = fitted(Codes(), sampled())
    with pytest.raises(WrongClassCountError, match="made for 20 classes, the logits have 21"):
        codec.encode(torch.zeros(2, 21), parameters)


def test_codes_of_another_codec_are_refused():
    codec, parameters = fitted(Codes(), sampled())
    with pytest.raises(ShapeError, match=r"shape \[row, 21\], got \(2, 20\)"):
        codec.decode(torch.zeros(2, 20, dtype=torch.uint8), parameters)


def test_codes_of_another_dtype_are_refused():
    codec, parameters = fitted(Codes(), sampled())
    with pytest.raises(CodecError, match=r"stored as torch\.uint8, got torch\.int16"):
        codec.decode(torch.zeros(2, 21, dtype=torch.int16), parameters)


def altered(name, value):
    _, parameters = fitted(Codes(), sampled())
    return {**parameters, name: value}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, r"needs parameters of the shapes .* got \{\}"),
        (altered("codebook", torch.zeros(256)), r"got \{'codebook': \(256,\)"),
        (altered("surplus", torch.zeros(1)), r"'surplus': \(1,\)"),
        (altered("codebook", torch.zeros(255, dtype=torch.float64)), r"must be float32, got torch\.float64"),
        (altered("coefficients", torch.tensor([0.0, 0.1])), "a > 0 and b >= 0, got a=0.0"),
        (altered("coefficients", torch.tensor([0.1, -0.1])), "a > 0 and b >= 0"),
        (altered("coefficients", torch.tensor([float("nan"), 0.1])), "must be finite"),
        (altered("coefficients", torch.tensor([0.1, 0.1])), "one of them is altered"),
        (altered("codebook", torch.arange(255.0)), "one of them is altered"),
    ],
)
def test_parameters_that_are_not_a_codebook_with_its_coefficients_are_refused(parameters, message):
    with pytest.raises(CodecError, match=message):
        Decoder(CodesCodec(Codes(), 20), parameters)


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_compiles_as_one_graph(spec):
    codec, parameters = fitted(spec, sampled())
    codes = codec.encode(sampled(), parameters)
    compiled = torch.compile(codec.decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes, parameters), codec.decode(codes, parameters))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch warns of itself
@pytest.mark.parametrize("spec", SPECS)
def test_compiled_decoding_gives_the_same_bits(spec):
    codec, parameters = fitted(spec, sampled())
    codes = codec.encode(sampled(), parameters)
    compiled = torch.compile(codec.decode, fullgraph=True)
    assert torch.equal(compiled(codes, parameters), codec.decode(codes, parameters))
