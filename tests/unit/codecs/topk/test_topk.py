"""The topk codec: exact heads at every temperature, two kinds of tails, masks, ties, rows of any width."""

import numpy as np
import pytest
import torch

from kdcache.codecs import Decoder, measure, parameters_to
from kdcache.codecs.topk import TopKCodec
from kdcache.documents.codec_specs import TopK
from kdcache.errors import (
    CodecError,
    DocumentError,
    NonFiniteLogitsError,
    ShapeError,
    TemperatureError,
    WrongClassCountError,
)

TAILS = ["class-means", "samples"]
TEMPERATURES = [0.7, 1.0, 1.5, 2.0, 4.0, 8.0, 20.0, 1e6]
MASKED = float("-inf")


def sampled(num_rows=64, num_classes=300, scale=3.0, seed=0):
    """Rows around class means of their own, as teachers give them."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_classes, generator=torch.Generator().manual_seed(99)) * scale
    return means + torch.randn(num_rows, num_classes, generator=generator) * scale


def fitted(logits, **options):
    codec = TopKCodec(TopK(**options), logits.shape[1])
    parameters = parameters_to(codec.fit(logits), "cpu")
    codec.check_parameters(parameters)
    return codec, parameters


def coded(logits, **options):
    codec, parameters = fitted(logits, **options)
    return codec, parameters, codec.encode(logits, parameters)


def round_trip(logits, temperature=1.0, **options):
    codec, parameters, codes = coded(logits, **options)
    return codec.decode(codes, parameters, temperature=temperature)


def weights(logits, temperature, **options):
    """What a student reads: soft targets, or Horvitz-Thompson weights, float64."""
    return round_trip(logits, temperature, **options).double().div(temperature).exp()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_kept_classes_have_their_probability_at_every_temperature(tail, temperature):
    logits = sampled()
    true = torch.softmax(logits.double() / temperature, 1)
    top = logits.topk(4, 1).indices
    found = weights(logits, temperature, tail=tail, k=16, step=2.0**-6)
    torch.testing.assert_close(found.gather(1, top), true.gather(1, top), rtol=0.03, atol=0.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_class_means_give_normalised_soft_targets(temperature):
    found = weights(sampled(), temperature, tail="class-means").sum(1)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_tail_is_shared_out_like_the_class_means(temperature):
    logits = sampled()
    codec, parameters, codes = coded(logits, k=8)
    decoded = codec.decode(codes, parameters, temperature=temperature).double()
    shape = (parameters["class_means"].double() / max(temperature, 0.7)).expand_as(logits)
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, logits.topk(8, 1).indices, value=False)
    expected, found = (values.masked_fill(~outside, MASKED) for values in (shape, decoded / temperature))
    torch.testing.assert_close(torch.softmax(found, 1), torch.softmax(expected, 1), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 8.0])
def test_the_log_partition_of_bell_shaped_tails_is_right_to_a_few_thousandths(tail, temperature):
    logits = sampled(num_classes=2000)
    codec, parameters, codes = coded(logits, tail=tail)
    errors = codec.log_partition_error(logits, codes, parameters, temperature=temperature)
    assert 0 < float(errors.abs().amax()) < 5e-3


def test_the_log_partition_error_is_that_of_the_kept_classes_log_probabilities():
    logits = -(torch.arange(8) * (1 + torch.arange(8) / 8.0)).repeat(30, 1)  # levels of step 1: nothing is rounded
    logits = torch.cat([logits, sampled(30, 200) - 36], 1)
    codec, parameters, codes = coded(logits, k=8, num_nodes=3, step=1.0)
    decoded = codec.decode(codes, parameters, temperature=3.0).double()
    shift = torch.log_softmax(logits.double() / 3, 1)[:, 0] - torch.log_softmax(decoded / 3, 1)[:, 0]
    errors = codec.log_partition_error(logits, codes, parameters, temperature=3.0)
    torch.testing.assert_close(errors, shift, atol=1e-5, rtol=1e-3)


def test_more_nodes_make_the_log_partition_exacter():
    logits = sampled(num_classes=2000, scale=6.0)
    errors = []
    for num_nodes in (3, 5, 8):
        codec, parameters, codes = coded(logits, k=4, num_nodes=num_nodes)
        errors.append(float(codec.log_partition_error(logits, codes, parameters).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_class_means_beat_a_uniform_tail():
    pilot, logits = sampled(num_rows=256), sampled(seed=1)
    codec, parameters = fitted(pilot, k=8)
    codes = codec.encode(logits, parameters)
    flat = {**parameters, "class_means": torch.zeros(300)}
    shaped, uniform = (measure(logits, codec.decode(codes, p), [1.0]).mean() for p in (parameters, flat))
    assert shaped < 0.75 * uniform


@pytest.mark.parametrize("tail", TAILS)
def test_ties_are_kept_from_the_lowest_class_on(tail):
    logits = torch.zeros(3, 10)
    logits[1, 7] = 1.0
    codec, parameters, codes = coded(logits, tail=tail, k=3, num_samples=1)
    kept = codec.columns.unpack(codes)["kept_class"].add(1).cumsum(1).sub(1)
    classes = parameters["class_of_rank"][kept].sort(1).values
    assert classes.tolist() == [[0, 1, 2], [0, 1, 7], [0, 1, 2]]


@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_every_class_is_kept_when_k_reaches_the_number_of_classes(k):
    logits = sampled(num_classes=8)
    found = weights(logits, 2.0, k=k, step=2.0**-6)
    bound = {1: 1.0, 3: 1.0, 8: 2e-3, 16: 2e-3}[k]
    assert float((found - torch.softmax(logits.double() / 2, 1)).abs().amax()) < bound


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_a_few_classes_are_coded(tail, num_classes):
    logits = sampled(num_classes=num_classes)
    found = weights(logits, 1.0, tail=tail, k=2, num_samples=2, step=2.0**-6)
    torch.testing.assert_close(found, torch.softmax(logits.double(), 1), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("tail", TAILS)
def test_constant_rows_are_uniform_at_every_temperature(tail):
    found = weights(torch.full((4, 50), 3.0), 1.7, tail=tail, k=4, num_samples=46)
    torch.testing.assert_close(found, torch.full((4, 50), 1 / 50, dtype=torch.float64), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("width", [1e3, 1e4, 1e6])
def test_rows_like_one_hot_keep_their_class(tail, width):
    logits = torch.full((3, 40), -width)
    logits[[0, 1, 2], [5, 39, 0]] = 0.0
    found = weights(logits, 1.0, tail=tail, k=4)
    torch.testing.assert_close(found, torch.softmax(logits.double(), 1), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("depth", [100.0, 1e4, 1e6])
def test_classes_far_below_the_tail_do_not_disturb_it(tail, temperature, depth):
    logits = sampled(num_rows=8)
    logits[:, ::3] -= depth
    codec, parameters, codes = coded(logits, tail=tail)
    errors = codec.log_partition_error(logits, codes, parameters, temperature=temperature)
    assert float(errors.abs().amax()) < 5e-3


@pytest.mark.parametrize("tail", TAILS)
def test_tails_where_levels_lie_far_apart_decode_to_numbers(tail):
    logits = torch.full((2, 5), -999_777.0)
    logits[:, 3] = 0.0
    codec, parameters, codes = coded(logits, tail=tail, k=2, step=1.0, num_samples=3)
    assert not codec.is_fill(codes).any()
    assert codec.decode(codes, parameters, temperature=1e3).argmax(1).tolist() == [3, 3]


def spread_out(scale, num_classes=20_000, num_rows=4):
    """Rows of normal logits of a standard deviation, in which the largest gaps are about eight times of it."""
    return torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(1)) * scale


WIDE = {
    "normal, 10": lambda: spread_out(10.0),
    "normal, 20": lambda: spread_out(20.0),
    "normal, 40": lambda: spread_out(40.0),
    "normal, 100": lambda: spread_out(100.0),
    "normal, 1000": lambda: spread_out(1000.0),
    "half at -1e4": lambda: spread_out(3.0).index_fill(1, torch.arange(0, 20_000, 2), -1e4),
    "half at -1e4, others wide": lambda: spread_out(20.0).index_fill(1, torch.arange(0, 20_000, 2), -1e4),
    "a clump 25 below": lambda: spread_out(1.0) - 25.0 * (torch.arange(20_000) < 15_000),
    "a clump 50 below": lambda: spread_out(1.0) - 50.0 * (torch.arange(20_000) < 19_000),
    "all but a hundred 150 below": lambda: spread_out(3.0) - 150.0 * (torch.arange(20_000) >= 100),
}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 10.0, 20.0, 50.0, 100.0, 1000.0])
@pytest.mark.parametrize("rows", WIDE)
def test_the_log_partition_of_wide_rows_is_right_at_every_temperature(rows, temperature):
    logits = WIDE[rows]()
    codec, parameters, codes = coded(logits)
    errors = codec.log_partition_error(logits, codes, parameters, temperature=temperature)
    assert float(errors.abs().amax()) < 3e-3


@pytest.mark.parametrize("temperature", [10.0, 50.0])
def test_weights_of_samples_of_wide_rows_have_the_mass_of_the_kept_classes_right(temperature):
    logits = spread_out(100.0)
    top = logits.topk(8, 1).indices
    found = weights(logits, temperature, tail="samples", step=2.0**-6).gather(1, top)
    true = torch.softmax(logits.double() / temperature, 1).gather(1, top)
    torch.testing.assert_close(found, true, rtol=0.01, atol=0.0)


def test_rows_that_one_polynomial_follows_have_no_far_group():
    codec, _, codes = coded(sampled(num_classes=2000))
    assert not codec.columns.unpack(codes)["far_count"].any()


def test_far_classes_fall_into_groups_that_begin_at_a_class_and_are_four_times_as_wide():
    logits = torch.cat([torch.zeros(2, 20), torch.tensor([[-80.0, -300.0, -350.0, -5e4, -1e6, -2e6]] * 2)], 1)
    codec, _, codes = coded(logits, k=4)
    fields = codec.columns.unpack(codes)
    assert fields["far_count"].tolist() == [[2, 1, 1, 2]] * 2
    begins = torch.exp2(fields["far_gap"][0] / 256).tolist()
    assert begins == pytest.approx([80.0, 350.0, 5e4, 1e6], rel=0.003)


def test_rows_of_more_than_four_groups_keep_the_number_of_their_classes():
    logits = torch.cat([torch.zeros(2, 20), -torch.tensor([[100.0, 1e3, 1e4, 1e5, 1e6, 5e6]] * 2)], 1)
    codec, parameters, codes = coded(logits, k=4)
    errors = codec.log_partition_error(logits, codes, parameters, temperature=1e9)
    assert float(errors.abs().amax()) < 1e-3


def test_far_classes_count_at_very_high_temperatures():
    logits = sampled(num_rows=8)
    logits[:, ::3] -= 100.0
    codec, parameters, codes = coded(logits)
    errors = codec.log_partition_error(logits, codes, parameters, temperature=1e5)
    assert float(errors.abs().amax()) < 5e-3


def test_a_gap_beyond_reach_counts_as_masked():
    logits = sampled()
    logits[:, 7] = torch.finfo(torch.float32).min
    assert bool((round_trip(logits)[:, 7] == MASKED).all())


def masked(logits, classes):
    return logits.index_fill(1, torch.tensor(classes), MASKED)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_classes_masked_in_every_row_stay_masked(tail, temperature):
    logits = masked(sampled(), [0, 150, 299])
    decoded = round_trip(logits, temperature, tail=tail)
    assert bool((decoded[:, [0, 150, 299]] == MASKED).all())


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_class_means_leave_no_other_class_masked(temperature):
    decoded = round_trip(masked(sampled(), [0, 150, 299]), temperature)
    assert (decoded == MASKED).sum(1).tolist() == [3] * 64


@pytest.mark.parametrize("tail", TAILS)
def test_masks_leave_the_log_partition_as_exact(tail):
    logits = masked(sampled(num_classes=2000), [0, 150, 299])
    codec, parameters, codes = coded(logits, tail=tail)
    assert float(codec.log_partition_error(logits, codes, parameters).abs().amax()) < 5e-3


def test_samples_hold_masks_that_change_from_row_to_row():
    logits = sampled()
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 0.99, 64)[:, None]
    logits = logits.masked_fill(mask & (logits < logits.amax(1, keepdim=True)), MASKED)
    codec, parameters, codes = coded(logits, tail="samples")
    decoded = codec.decode(codes, parameters)
    assert bool((decoded[logits == MASKED] == MASKED).all())
    assert float(codec.log_partition_error(logits, codes, parameters).abs().amax()) < 5e-3


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_rows_with_fewer_classes_than_k_hold_them_all(tail, temperature):
    logits = masked(sampled(num_classes=20), list(range(3, 20)))
    found = weights(logits, temperature, tail=tail, k=8, step=2.0**-6)
    torch.testing.assert_close(found, torch.softmax(logits.double() / temperature, 1), atol=2e-3, rtol=0.0)


def test_a_row_that_masks_another_class_is_refused_by_class_means_with_its_remedies():
    codec, parameters = fitted(sampled())
    logits = sampled()
    logits[5, 7] = MASKED
    message = (
        r"Row 5: class 7 is masked, and is masked in not every row of the pilot.*"
        r'TopK\(tail="samples"\) or Lossless\(\).*None of these rows was encoded'
    )
    with pytest.raises(CodecError, match=message):
        codec.encode(logits, parameters)


def test_a_row_that_does_not_mask_what_the_pilot_masked_is_refused():
    codec, parameters = fitted(masked(sampled(), [7]))
    with pytest.raises(CodecError, match="Row 0: class 7 is not masked, and is masked in every row of the pilot"):
        codec.encode(sampled(), parameters)


def test_a_row_of_a_later_block_is_named_by_its_place_in_the_batch():
    logits = torch.zeros(7, 100_000)
    codec, parameters = fitted(logits)
    logits[5, 3] = MASKED
    with pytest.raises(CodecError, match="Row 5: class 3 is masked"):
        codec.encode(logits, parameters)


def test_a_pilot_whose_masks_change_is_refused_by_class_means():
    logits = sampled()
    logits[3, 7] = MASKED
    with pytest.raises(CodecError, match=r"Class 7 is masked in 1 of the pilot's 64 rows.*samples"):
        TopKCodec(TopK(), 300).fit(logits)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_with_their_row(tail, value):
    codec, parameters = fitted(sampled(), tail=tail)
    logits = sampled()
    logits[9, 1] = value
    with pytest.raises(NonFiniteLogitsError, match="Row 9 of the logits"):
        codec.encode(logits, parameters)


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_without_any_class_is_refused(tail):
    codec, parameters = fitted(sampled(), tail=tail)
    logits = sampled()
    logits[2] = MASKED
    with pytest.raises(NonFiniteLogitsError, match=r"Row 2 of the logits .* nothing but -inf"):
        codec.encode(logits, parameters)


def test_an_empty_pilot_is_refused():
    with pytest.raises(CodecError, match="The pilot has no rows"):
        TopKCodec(TopK(), 2).fit(torch.empty(0, 2))


def test_a_pilot_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteLogitsError, match="Row 1 of the logits"):
        TopKCodec(TopK(), 2).fit(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))


def test_fewer_than_one_class_is_refused():
    with pytest.raises(CodecError, match="at least 1 class, got num_classes=0"):
        TopKCodec(TopK(), 0)


def test_another_class_count_is_refused():
    codec, parameters = fitted(sampled())
    with pytest.raises(WrongClassCountError, match="made for 300 classes, the logits have 301"):
        codec.encode(torch.zeros(2, 301), parameters)


def test_codes_of_another_codec_are_refused():
    codec, parameters = fitted(sampled())
    with pytest.raises(ShapeError, match=r"shape \[row, 100\], got \(2, 20\)"):
        codec.decode(torch.zeros(2, 20, dtype=torch.uint16), parameters)


def test_codes_of_another_dtype_are_refused():
    codec, parameters = fitted(sampled())
    with pytest.raises(CodecError, match=r"stored as torch\.uint16, got torch\.int16"):
        codec.decode(torch.zeros(2, 100, dtype=torch.int16), parameters)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    codec, parameters, codes = coded(sampled())
    with pytest.raises(TemperatureError):
        codec.decode(codes, parameters, temperature=temperature)


def without(name):
    return lambda parameters: {key: value for key, value in parameters.items() if key != name}


def changed(name, change):
    return lambda parameters: {**parameters, name: change(parameters[name].clone())}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (without("node_mean"), "needs the parameters"),
        (without("class_means"), "needs the parameters"),
        (lambda parameters: {**parameters, "surplus": torch.zeros(1)}, "needs the parameters"),
        (changed("class_means", lambda means: means.double()), "needs the parameters"),
        (changed("class_means", lambda means: means[:-1]), "needs the parameters"),
        (changed("class_of_rank", lambda classes: classes.index_fill(0, torch.tensor([3]), 5)), "every class once"),
        (changed("node_basis", lambda basis: basis * 1.001), "no rotation"),
        (changed("node_basis", lambda basis: basis * float("nan")), "no rotation"),
        (changed("node_mean", lambda mean: mean * float("inf")), "not finite"),
        (changed("class_means", lambda means: means * float("nan")), "Class means must be finite"),
        (changed("class_means", lambda means: means.fill_(float("inf"))), "Class means must be finite"),
        (changed("class_means", lambda means: means.fill_(MASKED)), "not all of them"),
    ],
)
def test_parameters_of_another_codec_or_altered_are_refused(alter, message):
    codec, parameters = fitted(sampled())
    with pytest.raises(CodecError, match=message):
        codec.check_parameters(alter(parameters))


def test_samples_have_no_class_means():
    _, parameters = fitted(sampled(), tail="samples")
    assert sorted(parameters) == ["class_of_rank", "node_basis", "node_mean"]


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"k": 5000}, {"step": 0.0}, {"step": 2.0}, {"tail": "uniform"}, {"num_nodes": 1}, {"seed": -1}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(DocumentError):
        TopK.make(**options)


def test_a_spec_survives_json():
    spec = TopK(k=9, tail="samples", sample_temperature=3.0, seed=4)
    assert TopK.from_json(spec.to_json(), source="test") == spec


@pytest.mark.parametrize(("tail", "num_columns"), [("class-means", 8 + 8 + 12 + 56), ("samples", 84 + 2 + 5 + 5)])
def test_columns_follow_the_format(tail, num_columns):
    codec = TopKCodec(TopK(k=8, tail=tail, num_samples=5), 300)
    assert (codec.num_columns, codec.storage_dtype, codec.fill) == (num_columns, "uint16", 65535)


def test_only_samples_are_normalised_and_both_depend_on_temperature():
    codecs = [TopKCodec(TopK(tail=tail), 300) for tail in TAILS]
    assert [codec.is_normalised for codec in codecs] == [False, True]
    assert [codec.depends_on_temperature for codec in codecs] == [True, True]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num_classes", [65_535, 65_536, 262_144])
def test_vocabularies_of_any_size_are_coded(tail, num_classes):
    logits = sampled(num_rows=3, num_classes=num_classes)
    logits[1, -1] = 100.0
    logits[2] = logits[2].flip(0)
    codec, parameters, codes = coded(logits, tail=tail, k=4, num_samples=4)
    top = logits.topk(2, 1).indices
    decoded = codec.decode(codes, parameters).double().exp()
    true = torch.softmax(logits.double(), 1)
    torch.testing.assert_close(decoded.gather(1, top), true.gather(1, top), rtol=0.15, atol=1e-9)


def test_high_parts_are_stored_where_ranks_pass_what_a_column_holds():
    logits = torch.zeros(2, 70_000)
    codec, parameters = fitted(logits, k=2)
    logits[:, [1, 69_000]] = torch.tensor([5.0, 9.0])
    fields = codec.columns.unpack(codes := codec.encode(logits, parameters))
    assert fields["kept_class"].tolist() == [[1, 68_998]] * 2
    assert codes.to(torch.int32).amax() < 65_535
    assert codec.decode(codes, parameters).argmax(1).tolist() == [69_000, 69_000]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_floating_point_type_are_coded(tail, dtype):
    codec, parameters = fitted(sampled(), tail=tail)
    logits = sampled().to(dtype)
    assert torch.equal(codec.encode(logits, parameters), codec.encode(logits.float(), parameters))


@pytest.mark.parametrize("tail", TAILS)
def test_float64_logits_far_from_zero_lose_nothing_to_their_shift(tail):
    codec, parameters = fitted(sampled(), tail=tail)
    logits = (sampled().double() * 1024).round() / 1024
    assert torch.equal(codec.encode(logits + 2.0**40, parameters), codec.encode(logits, parameters))


@pytest.mark.parametrize("tail", TAILS)
def test_large_batches_are_coded_as_small_ones(tail):
    logits = sampled(num_rows=5, num_classes=100_000)
    codec, parameters, codes = coded(logits, tail=tail)
    assert torch.equal(codes, torch.cat([codec.encode(row[None], parameters) for row in logits]))
    rows = torch.cat([codec.decode(row[None], parameters, temperature=2.0) for row in codes])
    assert torch.equal(codec.decode(codes, parameters, temperature=2.0), rows)


@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_batch_stays_empty(tail):
    codec, parameters = fitted(sampled(), tail=tail)
    codes = codec.encode(torch.empty(0, 300), parameters)
    assert codes.shape == (0, codec.num_columns)
    assert codec.decode(codes, parameters).shape == (0, 300)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("column", [0, 17, 40, -1])
def test_a_row_with_a_fill_code_in_any_column_is_a_hole(tail, column):
    codec, _, codes = coded(sampled(num_rows=3), tail=tail)
    codes[1, column] = codec.fill
    assert codec.is_fill(codes).tolist() == [False, True, False]


@pytest.mark.parametrize("tail", TAILS)
def test_a_hole_decodes_to_nan(tail):
    codec, parameters, codes = coded(sampled(num_rows=3), tail=tail)
    codes[1] = codec.fill
    decoded = codec.decode(codes, parameters)
    assert decoded.isnan().all(1).tolist() == [False, True, False]
    assert decoded.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("tail", TAILS)
def test_fitting_twice_gives_the_same_parameters(tail):
    first, second = (TopKCodec(TopK(tail=tail), 300).fit(sampled()) for _ in range(2))
    assert {name: value.tobytes() for name, value in first.items()} == {
        name: value.tobytes() for name, value in second.items()
    }


def test_a_decoder_takes_the_codec():
    codec, parameters, codes = coded(sampled())
    assert torch.equal(Decoder(codec, parameters).decode(codes), codec.decode(codes, parameters))


def test_frequent_classes_have_small_ranks():
    logits = sampled()
    _, parameters = fitted(logits, k=1)
    assert int(parameters["class_of_rank"][0]) == int(logits.argmax(1).mode().values)


def stranger(codes, parameters, temperature, *, k=16, num_nodes=12, step=0.125):
    """Decode a row of class means with NumPy and the published format alone."""
    places = np.cumsum([k, k, num_nodes, 4, 4])
    kept, gap, node, num_far, far_gap, far_node = np.split(codes.astype(np.int64), places)
    classes = parameters["class_of_rank"][np.cumsum(kept + 1) - 1]
    rise = step * (gap.max() - gap)
    gaps = rise * (1 + rise / 8)
    signed, far_signed = (np.where(codes % 2, -(codes + 1) // 2, codes // 2) for codes in (node, far_node))
    coefficients = signed / 512 @ parameters["node_basis"] + parameters["node_mean"]
    beta = 1 / temperature
    log_mean = beta * np.polynomial.chebyshev.chebval(2 * beta * 0.7 - 1, coefficients)
    means = parameters["class_means"].astype(np.float64)
    num_near = len(means) - np.isinf(means).sum() - k - num_far.sum()
    begins = 2 ** (far_gap / 256)
    b = beta * begins / 8
    edge = np.minimum(b, 2)
    polynomials = [np.polynomial.chebyshev.Chebyshev(c, domain=[0, 2]) for c in far_signed.reshape(4, -1) / 1024]
    log_far = [p(e) * x + (x - e) * e * p.deriv()(e) for p, x, e in zip(polynomials, b, edge, strict=True)]
    far = num_far @ np.exp(np.minimum(log_far, 0) - beta * begins)
    tail = np.exp(-beta * gaps.max()) * (num_near * np.exp(log_mean) + far)
    weights = np.exp((means - means.max()) * beta)
    weights[classes] = 0
    weights *= tail / weights.sum()
    weights[classes] = np.exp(-beta * gaps)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0, 20.0])
def test_a_stranger_decodes_with_the_format_alone(temperature):
    logits = sampled(num_rows=8)
    logits[:, ::50] -= 80.0
    codec, parameters, codes = coded(logits)
    arrays = {name: value.numpy() for name, value in parameters.items()}
    theirs = np.stack([stranger(row, arrays, temperature) for row in codes.numpy()])
    ours = codec.decode(codes, parameters, temperature=temperature).double().div(temperature).exp()
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-12)
