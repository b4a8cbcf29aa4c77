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
    codebook = torch.arange(254, dtype=torch.float32) * step
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
    codes = codec.encode(-widths * torch.tensor([[0.0, 253 * 2.0**-28]]), parameters)
    assert codes[0, -1].item() == exponent


def test_a_row_wider_than_the_codebook_is_scaled_and_never_clipped():
    codec, parameters = uniform(0.5, 3)
    decoded = codec.decode(codec.encode(torch.tensor([[0.0, -500.0, -1012.0]]), parameters), parameters)
    assert decoded.tolist() == [[0.0, -500.0, -1012.0]]


def test_a_row_beyond_every_exponent_is_refused_with_its_width():
    codec, parameters = uniform(2.0**-29, 2)
    with pytest.raises(CodecError, match=r"Row 1 spans 600 logits.*; this codebook reaches 506 at most"):
        codec.encode(torch.tensor([[0.0, 1.0], [0.0, -600.0]]), parameters)


@pytest.mark.parametrize("masked", [-1100.0, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_class_masked_by_a_large_number_is_refused_by_row_gap_class_and_remedies(masked):
    codec, parameters = uniform(0.5, 3)
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, masked, 4.0]])
    message = (
        rf"Row 1 spans {re.escape(f'{5 - masked:.6g}')} logits, from class 0 down to class 1; "
        r"uint8 codes reach 1012 at most.*"
        r"give -inf instead, which is kept exactly.*uint16.*reach 262,132, or Lossless\(\)\. None of these rows"
    )
    with pytest.raises(CodecError, match=message):
        codec.encode(logits, parameters)


@pytest.mark.parametrize("spec", SPECS)
def test_a_pilot_with_a_class_masked_by_a_large_number_is_refused(spec):
    with pytest.raises(CodecError, match=r"Row 0 spans 1e\+09 logits, from class 0 down to class 1"):
        CodesCodec(spec, 2).fit(torch.tensor([[0.0, -1e9]]))


def test_sixteen_bits_offer_only_what_is_finer_still():
    codec, parameters = fitted(Codes(dtype="uint16"), sampled())
    with pytest.raises(CodecError, match=r"uint16 codes reach 262132 at most.* otherwise use Lossless\(\)"):
        codec.encode(torch.full((1, 20), -1e9).index_fill(1, torch.tensor(0), 0.0), parameters)


def test_a_row_of_a_later_block_is_named_by_its_place_in_the_batch():
    codec, parameters = uniform(0.5, 100_000)
    logits = torch.zeros(7, 100_000)
    logits[5, 3] = -2000.0
    with pytest.raises(CodecError, match="Row 5 spans 2000 logits, from class 0 down to class 3"):
        codec.encode(logits, parameters)


def test_the_lowest_class_that_is_named_is_not_a_masked_one():
    codec, parameters = uniform(0.5, 3)
    with pytest.raises(CodecError, match="Row 0 spans 2000 logits, from class 0 down to class 2"):
        codec.encode(torch.tensor([[0.0, -torch.inf, -2000.0]]), parameters)


def test_an_infinite_logit_of_a_later_block_is_named_by_its_place_in_the_batch():
    codec, parameters = uniform(0.5, 100_000)
    logits = torch.zeros(7, 100_000)
    logits[6, 3] = float("inf")
    with pytest.raises(NonFiniteLogitsError, match="Row 6 of the logits"):
        codec.encode(logits, parameters)


@pytest.mark.parametrize(("dtype", "widest"), [("uint8", 1012.0), ("uint16", 262_132.0)])
def test_the_widest_row_that_is_coded_spans_four_logits_a_level(dtype, widest):
    codec, parameters = fitted(Codes(dtype=dtype), torch.tensor([[0.0, -widest]]))
    decoded = codec.decode(codec.encode(torch.tensor([[0.0, -widest]]), parameters), parameters)
    assert codec.widest_gap == widest
    assert decoded[0, 1].item() == pytest.approx(-widest, rel=0.01)


@pytest.mark.parametrize("masked", [-300.0, -1e4, -65_000.0])
def test_sixteen_bits_keep_the_soft_targets_beside_a_class_masked_by_a_large_number(masked):
    logits = sampled()
    logits[:, 7] = masked
    codec, parameters = fitted(Codes(dtype="uint16"), logits)
    decoded = codec.decode(codec.encode(logits, parameters), parameters)
    assert float(measure(logits, decoded).mean(0).amax()) < 1e-3


NO_SOFT_TARGETS = [
    ([0.0, torch.nan], "holds NaN or"),
    ([0.0, torch.inf], r"or \+inf"),
    ([-torch.inf, torch.nan], "holds NaN or"),
    ([-torch.inf, torch.inf], r"or \+inf"),
    ([-torch.inf, -torch.inf], "holds nothing but -inf"),
]


@pytest.mark.parametrize(("row", "held"), NO_SOFT_TARGETS)
def test_logits_without_soft_targets_are_refused_with_their_row(row, held):
    codec, parameters = uniform(0.5, 2)
    with pytest.raises(NonFiniteLogitsError, match=f"Row 1 of the logits .*{held}"):
        codec.encode(torch.tensor([[0.0, 1.0], row]), parameters)


@pytest.mark.parametrize(("row", "held"), NO_SOFT_TARGETS)
def test_a_pilot_without_soft_targets_is_refused_with_its_row(row, held):
    with pytest.raises(NonFiniteLogitsError, match=f"Row 1 of the logits .*{held}"):
        CodesCodec(Codes(), 2).fit(torch.tensor([[0.0, 1.0], row]))


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
def test_all_codes_but_the_two_reserved_have_a_level(spec):
    codebook = CodesCodec(spec, 20).fit(sampled())["codebook"]
    assert codebook.shape == ({"uint8": 254, "uint16": 65_534}[spec.dtype],)


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
    codes = torch.tensor([[0, 9, 14, 0], [0, 253, 14, 2]], dtype=torch.uint8)
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
    codebook = torch.arange(65534, dtype=torch.float32) * step
    parameters = {"codebook": codebook, "coefficients": torch.tensor([step, 0.0])}
    top = 2.0**-20
    logits = torch.tensor([[top, -32 - step / 2, top - step / 2 - 2.0**-34]])
    codes = codec.encode(logits, parameters)
    measured = error_range(logits, codec.decode(codes, parameters)).item()
    assert step < measured <= codec.error_range_bound(codes, parameters).item()


# Masked classes -------------------------------------------------------------------------------------------------------


def masked_by_row(logits):
    """Mask other classes in each row: none in row 0, all but two in row 19."""
    rows, classes = torch.meshgrid(*(torch.arange(size) for size in logits.shape), indexing="ij")
    return logits.masked_fill((rows % 20) > (classes + rows * 7) % 20 + 1, -torch.inf)


def coded(spec, logits):
    """The logits after encoding and decoding, by a codec that was fitted on them."""
    codec, parameters = fitted(spec, logits)
    return codec.decode(codec.encode(logits, parameters), parameters)


def test_a_masked_class_has_the_code_below_the_fill_code_and_flags_its_row():
    codec, parameters = uniform(0.5, 3)
    codes = codec.encode(torch.tensor([[2.0, -torch.inf, 0.0], [2.0, 1.0, 0.0], [-torch.inf, 0.0, -253.0]]), parameters)
    assert codes.tolist() == [[0, 254, 4, 128], [0, 2, 4, 0], [254, 0, 253, 129]]


def test_a_masked_class_has_the_code_65534_in_sixteen_bits():
    codec, parameters = fitted(Codes(dtype="uint16"), torch.tensor([[0.0, -torch.inf]]))
    codes = codec.encode(torch.tensor([[0.0, -torch.inf]]), parameters)
    assert codes.to(torch.int32).tolist() == [[0, 65_534, 128]]


@pytest.mark.parametrize("spec", SPECS)
def test_masked_classes_are_decoded_as_such_and_no_others(spec):
    logits = masked_by_row(sampled())
    assert torch.equal(coded(spec, logits).isneginf(), logits.isneginf())


@pytest.mark.parametrize("spec", SPECS)
def test_the_classes_beside_masked_ones_are_coded_as_if_those_were_not_there(spec):
    logits = sampled()
    codec, parameters = fitted(spec, logits)
    masked = torch.cat([logits, torch.full((64, 5), -torch.inf)], dim=1)
    wider = CodesCodec(spec, 25)
    decoded = wider.decode(wider.encode(masked, parameters), parameters)
    assert torch.equal(decoded[:, :20], codec.decode(codec.encode(logits, parameters), parameters))


@pytest.mark.parametrize("spec", SPECS)
def test_a_pilot_is_fitted_to_the_classes_that_are_not_masked(spec):
    logits = sampled()
    masked = torch.cat([logits, torch.full((64, 5), -torch.inf)], dim=1)
    found, expected = CodesCodec(spec, 25).fit(masked), CodesCodec(spec, 20).fit(logits)
    assert found["codebook"][-1] == expected["codebook"][-1]


@pytest.mark.parametrize("spec", SPECS)
def test_masked_rows_lose_no_more_than_others(spec):
    logits = masked_by_row(sampled())
    limit = {"uint8": 1e-3, "uint16": 1e-7}[spec.dtype]
    assert float(measure(logits, coded(spec, logits)).amax()) < limit


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_classes_of_any_floating_point_type_are_kept(spec, dtype):
    logits = torch.tensor([[1.0, -torch.inf], [-torch.inf, 1.0], [1.0, 0.0]], dtype=dtype)
    assert torch.equal(coded(spec, logits).isneginf(), logits.isneginf())


def test_a_finite_float64_logit_beyond_float32_is_not_taken_for_a_masked_class():
    codec, parameters = uniform(0.5, 2)
    with pytest.raises(CodecError, match="Row 0 spans inf logits"):
        codec.encode(torch.tensor([[0.0, -1e300]], dtype=torch.float64), parameters)


@pytest.mark.parametrize("spec", SPECS)
def test_masked_classes_of_later_blocks_are_kept(spec):
    logits = sampled(num_rows=7, num_classes=100_000)
    logits[5, 3:99_998] = -torch.inf
    assert torch.equal(coded(spec, logits).isneginf(), logits.isneginf())


@pytest.mark.parametrize("spec", SPECS)
def test_the_error_range_bound_holds_beside_masked_classes(spec):
    logits = masked_by_row(sampled())
    codec, parameters = fitted(spec, logits)
    codes = codec.encode(logits, parameters)
    measured = error_range(logits, codec.decode(codes, parameters))
    assert bool((measured <= codec.error_range_bound(codes, parameters)).all())


def test_masked_classes_do_not_loosen_the_error_range_bound():
    codec, parameters = uniform(0.5, 3)
    codes = torch.tensor([[0, 254, 14, 128 + 2]], dtype=torch.uint8)
    torch.testing.assert_close(codec.error_range_bound(codes, parameters), torch.tensor([2.0]), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_with_masked_classes_are_no_holes(spec):
    codec, parameters = fitted(spec, masked_by_row(sampled()))
    assert not codec.is_fill(codec.encode(masked_by_row(sampled()), parameters)).any()


@pytest.mark.parametrize("spec", SPECS)
def test_a_hole_among_masked_rows_decodes_to_nan(spec):
    codec, parameters = fitted(spec, masked_by_row(sampled()))
    codes = codec.encode(masked_by_row(sampled()), parameters)
    codes[19, -1] = codec.fill
    assert codec.decode(codes, parameters).isnan().all(1).nonzero().tolist() == [[19]]


@pytest.mark.parametrize("spec", SPECS)
def test_masked_classes_are_decoded_under_compilation_too(spec):
    logits = masked_by_row(sampled())
    codec, parameters = fitted(spec, logits)
    codes = codec.encode(logits, parameters)
    compiled = torch.compile(codec.decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes, parameters), codec.decode(codes, parameters))


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
        (altered("codebook", torch.zeros(254, dtype=torch.float64)), r"must be float32, got torch\.float64"),
        (altered("coefficients", torch.tensor([0.0, 0.1])), "a > 0 and b >= 0, got a=0.0"),
        (altered("coefficients", torch.tensor([0.1, -0.1])), "a > 0 and b >= 0"),
        (altered("coefficients", torch.tensor([float("nan"), 0.1])), "must be finite"),
        (altered("coefficients", torch.tensor([0.1, 0.1])), "one of them is altered"),
        (altered("codebook", torch.arange(254.0)), "one of them is altered"),
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
