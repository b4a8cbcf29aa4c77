"""What the codecs promise for any logits: nearest levels, bounded errors, exact maxima, bits kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdcache.codecs import (
    LADDER,
    CodesCodec,
    LosslessCodec,
    error_range,
    kl_bound,
    measure,
    parameters_to,
    total_variation_bound,
)
from kdcache.documents import Codes, Lossless

FINITE = st.floats(-1e4, 1e4, width=32)


@st.composite
def logits(draw, num_rows=6):
    """Rows of any shape: drawn element by element, or bell-shaped of any scale, offset and tail."""
    num_classes = draw(st.integers(1, 40))
    if draw(st.booleans()):
        return torch.from_numpy(draw(arrays.arrays(np.float32, (num_rows, num_classes), elements=FINITE)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bell = generator.standard_normal((num_rows, num_classes)) ** draw(st.sampled_from([1, 3]))
    scaled = bell * 2.0 ** draw(st.integers(-12, 12)) + draw(st.sampled_from([0.0, 100.0, -3000.0]))
    return torch.from_numpy(scaled.astype(np.float32))


specs = st.builds(Codes, dtype=st.sampled_from(["uint8", "uint16"]), spacing=st.sampled_from(["uniform", "companded"]))


def narrowed(rows, codec):
    """Rows that the codec takes, with a margin for what they decode to."""
    widest = float((rows.amax(1) - rows.amin(1)).max())
    return rows * min(1.0, 0.9 * codec.widest_gap / max(widest, 1.0))


@st.composite
def coded(draw):
    """A pilot, and rows that may be up to 2^5 times as wide or 2^8 times as narrow, as after a change of domain."""
    pilot = draw(logits())
    codec = CodesCodec(draw(specs), pilot.shape[1])
    pilot = narrowed(pilot, codec)
    parameters = parameters_to(codec.fit(pilot), "cpu")
    rows = narrowed(pilot.flip(0) * 2.0 ** draw(st.integers(-8, 5)), codec)
    return codec, parameters, rows, codec.encode(rows, parameters)


def levels_in_logits(codes, parameters):
    """The levels a row can take, by the stored codebook alone: [row, code]."""
    return parameters["codebook"].double() * 2.0 ** codes[:, -1:].double()


common = settings(max_examples=40, deadline=None)


@common
@given(coded())
def test_every_gap_gets_its_nearest_level(case):
    _, parameters, rows, codes = case
    gaps = (rows.amax(1, keepdim=True) - rows).double()
    levels = levels_in_logits(codes, parameters)
    places = torch.searchsorted(levels, gaps).clamp(1, levels.shape[1] - 1)
    nearest = torch.minimum(gaps - levels.gather(1, places - 1), levels.gather(1, places) - gaps).abs()
    chosen = (gaps - levels.gather(1, codes[:, :-1].to(torch.int64))).abs()
    torch.testing.assert_close(chosen, nearest, rtol=0.0, atol=0.0)


@common
@given(coded())
def test_the_exponent_is_the_smallest_that_holds_the_row(case):
    _, parameters, rows, codes = case
    widest = (rows.amax(1) - rows.amin(1)).double()
    reach = levels_in_logits(codes, parameters)[:, -1]
    assert bool((widest <= reach).all())
    assert bool(((widest > reach / 2) | (codes[:, -1].to(torch.int32) == 0)).all())


@common
@given(coded())
def test_arithmetic_decoding_equals_the_codebook_bit_for_bit(case):
    codec, parameters, _, codes = case
    expected = levels_in_logits(codes, parameters).gather(1, codes[:, :-1].to(torch.int64))
    assert torch.equal(codec.decode(codes, parameters).double(), -expected)


@common
@given(coded())
def test_the_maximum_is_decoded_as_zero_exactly(case):
    codec, parameters, rows, codes = case
    top = rows.argmax(1, keepdim=True)
    assert not codec.decode(codes, parameters).gather(1, top).any()


@common
@given(coded())
def test_order_between_classes_is_never_reversed(case):
    codec, parameters, rows, codes = case
    decoded = codec.decode(codes, parameters).gather(1, rows.argsort(dim=1))
    assert bool((decoded.diff(dim=1) >= 0).all())


@common
@given(coded())
def test_the_error_range_stays_below_its_bound(case):
    codec, parameters, rows, codes = case
    measured = error_range(rows, codec.decode(codes, parameters))
    assert bool((measured <= codec.error_range_bound(codes, parameters).double()).all())


@common
@given(coded())
def test_no_row_that_exists_reads_as_a_hole(case):
    codec, _, _, codes = case
    assert not codec.is_fill(codes).any()


@common
@given(coded(), st.sampled_from([0, -1]))
def test_a_fill_code_in_any_row_is_found(case, column):
    codec, _, _, codes = case
    codes[2, column] = codec.fill
    assert codec.is_fill(codes).nonzero().tolist() == [[2]]


@common
@given(coded())
def test_coding_again_what_was_decoded_changes_nothing(case):
    codec, parameters, _, codes = case
    decoded = codec.decode(codes, parameters)
    assert torch.equal(codec.decode(codec.encode(decoded, parameters), parameters), decoded)


@common
@given(coded())
def test_rows_are_coded_independently(case):
    codec, parameters, rows, codes = case
    assert torch.equal(codec.encode(rows[3:4], parameters), codes[3:4])


@common
@given(logits(), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_lossless_keeps_every_bit(rows, dtype):
    exact = rows.clamp(-6e4, 6e4).to({"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32))
    codec = LosslessCodec(Lossless(dtype=dtype), rows.shape[1])
    decoded = codec.decode(codec.encode(exact.float(), {}), {})
    assert torch.equal(decoded.view(torch.int32), exact.float().view(torch.int32))


def masks(draw, rows):
    """Classes to mask in each row, never all: drawn element by element, so that rows differ."""
    chosen = torch.from_numpy(draw(arrays.arrays(np.bool_, tuple(rows.shape))))
    return chosen & (torch.arange(rows.shape[1]) != rows.argmax(1, keepdim=True))


@st.composite
def masked(draw):
    """A codec fitted on rows with masked classes; its parameters, the rows whole, and which classes are masked."""
    rows = draw(logits())
    codec = CodesCodec(draw(specs), rows.shape[1])
    rows = narrowed(rows, codec)
    chosen = masks(draw, rows)
    return codec, parameters_to(codec.fit(rows.masked_fill(chosen, -torch.inf)), "cpu"), rows, chosen


@common
@given(masked())
def test_masked_classes_come_back_exactly_and_the_others_as_ever(case):
    codec, parameters, rows, chosen = case
    hidden = rows.masked_fill(chosen, -torch.inf)
    decoded = codec.decode(codec.encode(hidden, parameters), parameters)
    topped = rows.masked_fill(chosen, 0.0) + rows.amax(1, keepdim=True).masked_fill(~chosen, 0.0)  # no gap instead
    expected = codec.decode(codec.encode(topped, parameters), parameters)
    assert torch.equal(decoded, expected.masked_fill(chosen, -torch.inf))


@common
@given(masked())
def test_the_error_range_of_masked_rows_stays_below_its_bound(case):
    codec, parameters, rows, chosen = case
    hidden = rows.masked_fill(chosen, -torch.inf)
    codes = codec.encode(hidden, parameters)
    measured = error_range(hidden, codec.decode(codes, parameters))
    assert bool((measured <= codec.error_range_bound(codes, parameters).double()).all())


@common
@given(masked())
def test_masked_rows_are_coded_independently_and_are_no_holes(case):
    codec, parameters, rows, chosen = case
    hidden = rows.masked_fill(chosen, -torch.inf)
    codes = codec.encode(hidden, parameters)
    assert torch.equal(codec.encode(hidden[3:4], parameters), codes[3:4])
    assert not codec.is_fill(codes).any()


@common
@given(st.data(), logits(), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_lossless_keeps_masked_classes(data, rows, dtype):
    exact = rows.clamp(-6e4, 6e4).to({"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32))
    hidden = exact.float().masked_fill(masks(data.draw, rows), -torch.inf)
    codec = LosslessCodec(Lossless(dtype=dtype), rows.shape[1])
    assert torch.equal(codec.decode(codec.encode(hidden, {}), {}), hidden)


@st.composite
def true_and_decoded(draw):
    rows = draw(logits())
    errors = torch.from_numpy(draw(arrays.arrays(np.float32, tuple(rows.shape), elements=st.floats(-8, 8, width=32))))
    return rows.double(), rows.double() + errors.double() * 10.0 ** draw(st.integers(-6, 0))


@common
@given(true_and_decoded())
def test_kl_is_never_negative_and_never_above_hoeffdings_bound(pair):
    ranges = error_range(*pair)
    bounds = torch.stack([kl_bound(ranges, temperature) for temperature in LADDER], dim=1)
    divergences = measure(*pair)
    assert bool((divergences >= 0).all())
    assert bool((divergences <= bounds * (1 + 1e-9) + 1e-14).all())


@st.composite
def outlying_and_decoded(draw):
    """Pairs of rows whose logits and errors are of any magnitude, masked classes among them."""
    rows, errors = (draw(logits()).double() for _ in range(2))
    errors = errors.repeat(1, rows.shape[1])[:, : rows.shape[1]]
    places = st.lists(st.tuples(st.integers(0, 5), st.integers(0, rows.shape[1] - 1)), max_size=8)
    for values in (rows, errors):
        for place in draw(places):
            values[place] = draw(st.floats(-1e30, 1e30))
    return rows, rows + errors


def divergence_by_definition(rows, decoded, temperature):
    true, other = (torch.log_softmax(values / temperature, dim=1) for values in (rows, decoded))
    return (true.exp() * (true - other)).sum(1)


@common
@given(st.data(), true_and_decoded())
def test_masking_a_class_on_both_sides_is_as_leaving_it_out(data, pair):
    chosen = masks(data.draw, pair[0])
    kept = (torch.stack([values[row][~chosen[row]] for values in pair])[:, None] for row in range(len(chosen)))
    hidden = [values.masked_fill(chosen, -torch.inf) for values in pair]
    expected = [(measure(true, decoded), error_range(true, decoded)) for true, decoded in kept]
    torch.testing.assert_close(measure(*hidden), torch.cat([first for first, _ in expected]), rtol=1e-9, atol=1e-14)
    assert torch.equal(error_range(*hidden), torch.cat([second for _, second in expected]))


@common
@given(st.data(), true_and_decoded())
def test_masks_of_any_kind_measure_no_nan_and_nothing_negative(data, pair):
    whole = tuple(pair[0].shape)
    hidden = [
        values.masked_fill(torch.from_numpy(data.draw(arrays.arrays(np.bool_, whole))), -torch.inf) for values in pair
    ]
    assert bool((measure(*hidden) >= 0).all())
    assert bool((error_range(*hidden) >= 0).all())


@common
@given(outlying_and_decoded(), st.sampled_from(LADDER))
def test_kl_is_finite_and_right_for_logits_of_any_magnitude(pair, temperature):
    measured = measure(*pair, [temperature])[:, 0]
    torch.testing.assert_close(measured, divergence_by_definition(*pair, temperature), rtol=1e-6, atol=1e-9)


@common
@given(outlying_and_decoded())
def test_kl_of_logits_of_any_magnitude_is_below_hoeffdings_bound(pair):
    ranges = error_range(*pair)
    bounds = torch.stack([kl_bound(ranges, temperature) for temperature in LADDER], dim=1)
    assert bool((measure(*pair) <= bounds * (1 + 1e-9) + 1e-9).all())


@common
@given(true_and_decoded(), st.sampled_from(LADDER))
def test_total_variation_is_never_above_its_bound(pair, temperature):
    true, decoded = (torch.softmax(rows / temperature, 1) for rows in pair)
    distance = (true - decoded).abs().sum(1) / 2
    assert bool((distance <= total_variation_bound(error_range(*pair), temperature) + 1e-12).all())


@common
@given(true_and_decoded(), st.floats(-100, 100))
def test_neither_measure_sees_a_shift_of_a_row(pair, shift):
    true, decoded = pair
    torch.testing.assert_close(measure(true, decoded + shift), measure(true, decoded), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(error_range(true, decoded + shift), error_range(true, decoded), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("spacing", ["uniform", "companded"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_code_is_its_own_level(dtype, spacing):
    """Exhaustive: each level of the codebook, at each of a few exponents, codes to itself."""
    codec = CodesCodec(Codes(dtype=dtype, spacing=spacing), 65535)
    pilot = torch.randn(16, 65535, generator=torch.Generator().manual_seed(0)) / 4
    parameters = parameters_to(codec.fit(pilot), "cpu")
    num_levels = len(parameters["codebook"])
    levels = parameters["codebook"].repeat(65535 // num_levels + 1)[:65535]
    scales = torch.tensor([1.0, 2.0, 2.0**7])[:, None]
    codes = codec.encode(-levels * scales, parameters)
    assert torch.equal(codes[:, -1].to(torch.int32), torch.tensor([0, 1, 7], dtype=torch.int32))
    expected = torch.arange(num_levels).repeat(65535 // num_levels + 1)[:65535].expand(3, -1)
    assert torch.equal(codes[:, :-1].to(torch.int64), expected)
