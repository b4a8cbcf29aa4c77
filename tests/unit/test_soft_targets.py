"""Soft targets: the means over teachers, and the coded batch that a reader hands out."""

import math

import numpy as np
import pytest
import torch

from kdcache.codecs import Decoder, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, TopK
from kdcache.errors import (
    CodecError,
    MergedCacheError,
    OptionError,
    ShapeError,
    TemperatureError,
    UnknownTeacherError,
)
from kdcache.soft_targets import SoftTargets, log_mean_probabilities, mean_logits, soften

MEMBERS = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
WEIGHTS = [0.2, 0.3, 0.5]
MEANS = ["geometric", "arithmetic", "tempered-arithmetic"]


def lossless(logits, names, **options):
    """Soft targets whose codes are the logits themselves."""
    decoder = Decoder(codec_for(Lossless(), logits.shape[-1]), {})
    codes = tuple(logits.float().unbind(1))
    return SoftTargets(codes, (decoder,) * len(codes), names, **options)


def coded(logits, spec, names):
    codec = codec_for(spec, logits.shape[-1])
    decoders = [Decoder(codec, parameters_to(codec.fit(member), "cpu")) for member in logits.float().unbind(1)]
    codes = [
        codec.encode(member, decoder.parameters)
        for member, decoder in zip(logits.float().unbind(1), decoders, strict=True)
    ]
    return SoftTargets(tuple(codes), tuple(decoders), names)


@pytest.fixture
def ensemble():
    return lossless(MEMBERS, ("a", "b", "c"))


@pytest.fixture
def merged():
    return lossless(MEMBERS.mean(1, keepdim=True), ("a", "b", "c"), merge="geometric")


# --- functions of logits


def test_softening_is_equation_one():
    softened = soften(torch.tensor([math.log(9.0), 0.0]), temperature=2.0)
    torch.testing.assert_close(softened, torch.tensor([0.75, 0.25]))


def test_softening_works_on_any_leading_axes():
    torch.testing.assert_close(soften(MEMBERS, 3.0)[2, 1], soften(MEMBERS[2, 1], 3.0))


def test_softening_half_precision_gives_float32():
    assert soften(torch.zeros(2, dtype=torch.bfloat16), 1.0).dtype == torch.float32


def test_a_temperature_may_be_a_tensor_without_axes():
    assert torch.equal(soften(MEMBERS, torch.tensor(4.0)), soften(MEMBERS, 4.0))


@pytest.mark.parametrize(
    "temperature",
    [
        0,
        -1.0,
        math.nan,
        math.inf,
        True,
        "warm",
        "4",
        np.True_,
        torch.tensor(True),
        None,
        torch.tensor(0.0),
        torch.ones(1),
        torch.ones(2),
    ],
)
def test_what_is_no_temperature_is_refused(temperature):
    with pytest.raises(TemperatureError):
        soften(MEMBERS, temperature)


def test_mean_logits_are_weighted():
    expected = sum(weight * MEMBERS[:, index] for index, weight in enumerate(WEIGHTS))
    torch.testing.assert_close(mean_logits(MEMBERS, weights=WEIGHTS), expected)


def test_the_geometric_mean_is_the_normalised_product_of_powers():
    powers = [soften(MEMBERS[:, index], 3.0) ** weight for index, weight in enumerate(WEIGHTS)]
    product = powers[0] * powers[1] * powers[2]
    expected = product / product.sum(1, keepdim=True)
    torch.testing.assert_close(log_mean_probabilities(MEMBERS, temperature=3.0, weights=WEIGHTS).exp(), expected)


def test_the_arithmetic_mean_averages_probabilities_at_the_temperature_asked_for():
    expected = sum(weight * soften(MEMBERS[:, index], 3.0) for index, weight in enumerate(WEIGHTS))
    found = log_mean_probabilities(MEMBERS, temperature=3.0, mean="arithmetic", weights=WEIGHTS)
    torch.testing.assert_close(found.exp(), expected)


def test_the_tempered_arithmetic_mean_averages_at_temperature_one_and_softens_afterwards():
    mixture = sum(weight * soften(MEMBERS[:, index], 1.0) for index, weight in enumerate(WEIGHTS))
    found = log_mean_probabilities(MEMBERS, temperature=3.0, mean="tempered-arithmetic", weights=WEIGHTS)
    torch.testing.assert_close(found.exp(), soften(mixture.log(), 3.0))


def test_the_three_means_differ():
    geometric, arithmetic, tempered = (
        log_mean_probabilities(MEMBERS, temperature=3.0, mean=mean).exp() for mean in MEANS
    )
    assert (geometric - arithmetic).abs().max() > 0.01
    assert (tempered - arithmetic).abs().max() > 0.01
    assert (tempered - geometric).abs().max() > 0.01


@pytest.mark.parametrize("mean", MEANS)
def test_one_teacher_is_its_own_mean(mean):
    found = log_mean_probabilities(MEMBERS[:, :1], temperature=3.0, mean=mean)
    torch.testing.assert_close(found, torch.log_softmax(MEMBERS[:, 0] / 3.0, 1))


@pytest.mark.parametrize("mean", MEANS)
def test_a_weight_of_zero_leaves_the_teacher_out(mean):
    found = log_mean_probabilities(MEMBERS, temperature=3.0, mean=mean, weights=[1.0, 0.0, 3.0])
    expected = log_mean_probabilities(MEMBERS[:, [0, 2]], temperature=3.0, mean=mean, weights=[0.25, 0.75])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mean", MEANS)
def test_probabilities_that_underflow_keep_their_logarithms(mean):
    logits = torch.tensor([[[0.0, -500.0], [0.0, -600.0]]])
    found = log_mean_probabilities(logits, temperature=1.0, mean=mean)
    assert found.isfinite().all()
    assert found[0, 1] < -499


@pytest.mark.parametrize("weights", [[1.0, -0.1, 0.1], [0.0, 0.0, 0.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]])
def test_weights_that_are_no_weights_are_refused(weights):
    with pytest.raises(OptionError, match="finite, at least 0 and not all 0"):
        log_mean_probabilities(MEMBERS, temperature=1.0, weights=weights)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.1] * 4])
def test_another_number_of_weights_than_teachers_is_refused(weights):
    with pytest.raises(ShapeError, match="3 teachers need as many weights"):
        log_mean_probabilities(MEMBERS, temperature=1.0, mean="arithmetic", weights=weights)


@pytest.mark.parametrize("mean", MEANS)
def test_autocast_changes_no_soft_target(mean):
    logits = MEMBERS.float()
    expected = log_mean_probabilities(logits, temperature=2.0, mean=mean, weights=WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_mean_probabilities(logits, temperature=2.0, mean=mean, weights=WEIGHTS)
    assert torch.equal(found, expected)


def test_autocast_changes_no_mean_logit():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mean_logits(MEMBERS.float(), weights=WEIGHTS)
    assert torch.equal(found, mean_logits(MEMBERS.float(), weights=WEIGHTS))


@pytest.mark.accelerator
def test_reduced_precision_of_matrix_products_changes_no_mean_logit():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = mean_logits(MEMBERS.float().cuda(), weights=WEIGHTS).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, mean_logits(MEMBERS, weights=WEIGHTS).float(), rtol=1e-6, atol=1e-6)


def test_an_unknown_mean_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match="'geometric', 'arithmetic', 'tempered-arithmetic'; got 'harmonic'"):
        log_mean_probabilities(MEMBERS, temperature=1.0, mean="harmonic")


def test_logits_without_a_teacher_axis_are_refused():
    with pytest.raises(ShapeError, match=r"\[row, teacher, class\], got shape \(6, 5\)"):
        log_mean_probabilities(MEMBERS[:, 0], temperature=1.0)


# --- a batch of soft targets


def test_logits_are_decoded_with_the_axes_row_teacher_class(ensemble):
    torch.testing.assert_close(ensemble.logits(), MEMBERS.float())


@pytest.mark.parametrize("mean", MEANS)
def test_log_probabilities_are_those_of_the_logits(ensemble, mean):
    found = ensemble.log_probabilities(3.0, mean=mean)
    expected = log_mean_probabilities(MEMBERS, temperature=3.0, mean=mean)
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("mean", MEANS)
def test_probabilities_sum_to_one(ensemble, mean):
    torch.testing.assert_close(ensemble.probabilities(3.0, mean=mean).sum(1), torch.ones(6))


def test_soft_targets_are_float32(ensemble):
    assert ensemble.log_probabilities(2.0).dtype == torch.float32


@pytest.mark.parametrize("spec", [Codes(dtype="uint8"), Codes(dtype="uint16"), Lossless()])
@pytest.mark.parametrize("mean", MEANS)
def test_coded_teachers_give_the_soft_targets_of_live_ones(spec, mean):
    soft_targets = coded(MEMBERS, spec, ("a", "b", "c"))
    expected = log_mean_probabilities(MEMBERS, temperature=2.0, mean=mean).exp()
    torch.testing.assert_close(soft_targets.probabilities(2.0, mean=mean), expected.float(), atol=0.01, rtol=0.0)


def test_teachers_are_selected_by_name_in_the_order_given(ensemble):
    found = ensemble.log_probabilities(2.0, teachers=["c", "a"], weights=[3.0, 1.0], mean="arithmetic")
    expected = log_mean_probabilities(MEMBERS[:, [2, 0]], temperature=2.0, weights=[3.0, 1.0], mean="arithmetic")
    torch.testing.assert_close(found, expected.float())


def test_weights_may_be_given_by_name(ensemble):
    by_name = ensemble.log_probabilities(2.0, weights={"b": 1.0, "c": 2.0, "a": 3.0})
    assert torch.equal(by_name, ensemble.log_probabilities(2.0, weights=[3.0, 1.0, 2.0]))


def test_the_mean_logits_follow_weights_and_teachers(ensemble):
    found = ensemble.mean_logits(teachers=["a", "b"], weights=[3.0, 1.0])
    torch.testing.assert_close(found, (0.75 * MEMBERS[:, 0] + 0.25 * MEMBERS[:, 1]).float())


def test_an_unknown_teacher_is_refused_with_the_known_ones(ensemble):
    with pytest.raises(UnknownTeacherError, match=r"\['d'\] among \['a', 'd'\]; the ensemble has \['a', 'b', 'c'\]"):
        ensemble.probabilities(1.0, teachers=["a", "d"])


def test_no_teachers_at_all_are_refused(ensemble):
    with pytest.raises(UnknownTeacherError, match=r"among \[\]"):
        ensemble.probabilities(1.0, teachers=[])


def test_a_teachers_name_outside_a_list_is_refused(ensemble):
    with pytest.raises(OptionError, match=r"got the text 'a'; write \['a'\]"):
        ensemble.probabilities(1.0, teachers="a")


@pytest.mark.parametrize("spec", [Codes(dtype="uint8"), Codes(dtype="uint16"), Lossless()])
@pytest.mark.parametrize("mean", MEANS)
def test_autocast_changes_nothing_that_is_decoded(spec, mean):
    soft_targets = coded(MEMBERS, spec, ("a", "b", "c"))
    expected = soft_targets.log_probabilities(2.0, mean=mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft_targets.log_probabilities(2.0, mean=mean)
    assert torch.equal(found, expected)


def test_a_teacher_named_twice_is_refused(ensemble):
    with pytest.raises(OptionError, match="named twice"):
        ensemble.probabilities(1.0, teachers=["a", "a"])


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}])
def test_weights_by_name_must_name_the_selected_teachers(ensemble, weights):
    with pytest.raises(UnknownTeacherError, match=r"the selected teachers are \['a', 'b', 'c'\]"):
        ensemble.probabilities(1.0, weights=weights)


def test_as_many_weights_as_selected_teachers_are_needed(ensemble):
    with pytest.raises(ShapeError, match="2 teachers need as many weights"):
        ensemble.probabilities(1.0, teachers=["a", "b"], weights=WEIGHTS)


def test_a_merged_cache_gives_the_geometric_mean(merged, ensemble):
    torch.testing.assert_close(merged.log_probabilities(3.0), ensemble.log_probabilities(3.0))


def test_a_merged_cache_has_one_teacher_axis_entry(merged):
    assert merged.logits().shape == (6, 1, 5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mean": "arithmetic"}, "mean='arithmetic'"),
        ({"mean": "tempered-arithmetic"}, "mean='tempered-arithmetic'"),
        ({"weights": [1.0, 1.0, 1.0]}, r"weights=\[1.0, 1.0, 1.0\]"),
        ({"teachers": ["a"]}, r"teachers=\['a'\]"),
    ],
)
def test_a_merged_cache_refuses_what_needs_its_members(merged, options, named):
    with pytest.raises(MergedCacheError, match=f"only the geometric mean of a, b, c; it cannot give {named}"):
        merged.probabilities(1.0, **options)


def test_rows_that_are_not_available_are_nan():
    available = torch.tensor([True, False, True, True, True, False])
    soft_targets = lossless(MEMBERS, ("a", "b", "c"), available=available)
    assert torch.equal(soft_targets.logits().isnan().all(2).all(1), ~available)
    assert torch.equal(soft_targets.probabilities(2.0, mean="arithmetic").isnan().any(1), ~available)


@pytest.mark.parametrize("spec", [Codes(dtype="uint8"), Codes(dtype="uint16"), Lossless(dtype="float32")])
@pytest.mark.parametrize(
    "index", [torch.tensor([4, 0, 4]), torch.tensor([False, True, True, False, False, True]), slice(1, 6, 2), slice(0)]
)
def test_rows_are_selected_still_coded(spec, index):
    soft_targets = coded(MEMBERS, spec, ("a", "b", "c"))
    assert torch.equal(soft_targets.rows(index).logits(), soft_targets.logits()[index])
    assert soft_targets.rows(index).codes[0].dtype == soft_targets.codes[0].dtype


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (2, [2]),
        (-1, [5]),
        (np.int64(3), [3]),
        ([4, 0, -2], [4, 0, 4]),
        ((1, 1), [1, 1]),
        (range(2, 4), [2, 3]),
        (np.array([5, 1], dtype=np.int32), [5, 1]),
        (np.array([3, 0], dtype=np.uint16), [3, 0]),
        (torch.tensor([-1, 2], dtype=torch.int32), [5, 2]),
        (torch.tensor(2), [2]),
        ([True, False, False, False, True, False], [0, 4]),
        (np.arange(6) > 3, [4, 5]),
        ([], []),
    ],
    ids=str,
)
def test_whatever_names_rows_selects_them(ensemble, index, rows):
    assert torch.equal(ensemble[index].logits(), ensemble.logits()[rows])


def test_iterating_gives_batches_of_one_row(ensemble):
    logits = [row.logits() for row in ensemble]
    assert torch.equal(torch.cat(logits), ensemble.logits())
    assert {len(row) for row in logits} == {1}


@pytest.mark.parametrize("index", [6, -7, [0, 6], np.array([-7]), torch.tensor([99])])
def test_rows_that_do_not_exist_are_refused(ensemble, index):
    with pytest.raises(ShapeError, match=r"There is no row (6|-7|99): the batch has 6 rows"):
        ensemble[index]


@pytest.mark.parametrize("index", [[True], np.zeros(7, dtype=bool), torch.ones(5, dtype=torch.bool)])
def test_a_selecting_mask_of_another_length_is_refused(ensemble, index):
    with pytest.raises(ShapeError, match=r"A mask of 6 rows must have the shape \(6,\), got"):
        ensemble[index]


@pytest.mark.parametrize("index", [1.5, None, "a", True, [0.0], [[0, 1]], [[0], [1, 2]], torch.zeros(2), [None]])
def test_what_names_no_rows_is_refused(ensemble, index):
    with pytest.raises(ShapeError, match="Rows are selected by an integer, a slice"):
        ensemble[index]


def test_square_brackets_select_rows(ensemble):
    assert torch.equal(ensemble[2:4].logits(), ensemble.rows(slice(2, 4)).logits())


def test_availability_follows_the_selection():
    soft_targets = lossless(MEMBERS, ("a", "b", "c"), available=torch.arange(6) < 2)
    assert soft_targets.rows(torch.tensor([5, 1])).available.tolist() == [False, True]


def test_a_selection_forgets_the_rows_of_examples():
    soft_targets = lossless(MEMBERS, ("a", "b", "c"), num_rows=torch.tensor([2, 4]))
    assert soft_targets[:3].num_rows is None


def test_a_batch_shows_its_size_and_not_its_numbers():
    codes = coded(MEMBERS, Codes(), ("a", "b", "c"))
    assert repr(codes) == (
        "SoftTargets(rows=6, teachers=('a', 'b', 'c'), classes=5, codecs=('codes',), device='cpu', coded_bytes=108)"
    )


def test_a_merged_batch_says_so(merged):
    assert "rows=6, merge='geometric' of ('a', 'b', 'c'), classes=5, codecs=('lossless',)" in repr(merged)


def test_length_and_classes_are_those_of_the_batch(ensemble):
    assert (len(ensemble), ensemble.num_classes) == (6, 5)


def test_moving_keeps_everything_coded():
    num_rows = torch.tensor([2, 4])
    soft_targets = lossless(MEMBERS, ("a", "b", "c"), available=torch.arange(6) < 2, num_rows=num_rows)
    moved = soft_targets.to("meta")
    assert (moved.device.type, moved.available.device.type) == ("meta", "meta")
    assert (moved.teacher_names, moved.num_rows) == (("a", "b", "c"), num_rows)


def test_moving_to_where_it_lies_copies_nothing(ensemble):
    assert ensemble.to("cpu").codes[0].data_ptr() == ensemble.codes[0].data_ptr()


@pytest.mark.accelerator
def test_pinned_memory_holds_the_same_codes(ensemble):
    pinned = ensemble.pin_memory()
    assert pinned.codes[0].is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).logits().cpu(), ensemble.logits())


def test_codes_without_a_decoder_are_refused(ensemble):
    with pytest.raises(ShapeError, match="got 3 arrays of codes, 2 decoders"):
        SoftTargets(ensemble.codes, ensemble.decoders[:2], ensemble.teacher_names)


def test_a_batch_without_teachers_is_refused():
    with pytest.raises(ShapeError, match="got 0 arrays of codes"):
        SoftTargets((), (), ())


def test_a_merged_batch_has_one_array(ensemble):
    with pytest.raises(ShapeError, match=r"got 3 arrays of codes.* with merge='geometric'"):
        SoftTargets(ensemble.codes, ensemble.decoders, ensemble.teacher_names, merge="geometric")


def test_teachers_with_different_rows_are_refused(ensemble):
    codes = (ensemble.codes[0], ensemble.codes[1][:4], ensemble.codes[2])
    with pytest.raises(ShapeError, match=r"they have \[6, 4, 6\] rows and \[5, 5, 5\] classes"):
        SoftTargets(codes, ensemble.decoders, ensemble.teacher_names)


def test_codes_of_another_codec_are_refused(ensemble):
    codes = (ensemble.codes[0].half(), *ensemble.codes[1:])
    with pytest.raises(CodecError, match=r"stored as torch\.float32, got torch\.float16"):
        SoftTargets(codes, ensemble.decoders, ensemble.teacher_names)


def test_a_mask_of_another_length_is_refused(ensemble):
    with pytest.raises(ShapeError, match=r"`available` has the shape \(5,\) for 6 rows"):
        SoftTargets(
            ensemble.codes, ensemble.decoders, ensemble.teacher_names, available=torch.ones(5, dtype=torch.bool)
        )


# --- codecs that depend on the temperature

WIDE = torch.randn(6, 2, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
CLASS_MEANS = TopK(k=4)
SAMPLES = TopK(k=4, tail="samples", num_samples=6)


def decoded(soft_targets, teacher_index, temperature):
    """Decoded / temperature of one teacher."""
    decoder, codes = soft_targets.decoders[teacher_index], soft_targets.codes[teacher_index]
    return decoder.decode(codes, temperature=temperature) / temperature


@pytest.fixture
def class_means():
    return coded(WIDE, CLASS_MEANS, ("a", "b"))


@pytest.fixture
def samples():
    return coded(WIDE, SAMPLES, ("a", "b"))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_the_largest_probabilities_of_topk_are_right_at_the_temperature_asked_for(class_means, temperature):
    true = torch.softmax(WIDE[:, 0] / temperature, 1)
    expected, top = true.topk(4, 1)
    found = class_means.probabilities(temperature, teachers=["a"]).double().gather(1, top)
    torch.testing.assert_close(found, expected, rtol=0.3 / temperature, atol=0)


def test_logits_are_decoded_at_the_temperature_asked_for(class_means):
    torch.testing.assert_close(class_means.logits(temperature=4.0)[:, 1], 4 * decoded(class_means, 1, 4.0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_geometric_mean_of_topk_is_that_of_the_soft_targets_at_the_temperature(class_means, temperature):
    expected = torch.softmax((decoded(class_means, 0, temperature) + decoded(class_means, 1, temperature)) / 2, 1)
    torch.testing.assert_close(class_means.probabilities(temperature), expected)


def test_the_tempered_arithmetic_mean_of_topk_is_taken_at_temperature_1(class_means):
    mixture = sum(torch.softmax(decoded(class_means, index, 1.0), 1) for index in range(2)) / 2
    found = class_means.probabilities(4.0, mean="tempered-arithmetic")
    torch.testing.assert_close(found, torch.softmax(mixture.log() / 4, 1))


@pytest.mark.parametrize("mean", MEANS)
def test_the_three_means_of_one_teacher_are_the_same_for_topk(class_means, mean):
    found = class_means.log_probabilities(4.0, mean=mean, teachers=["a"])
    torch.testing.assert_close(found, torch.log_softmax(decoded(class_means, 0, 4.0), 1))


def test_mean_logits_of_topk_are_decoded_at_the_temperature(class_means):
    expected = 8 * (decoded(class_means, 0, 8.0) + decoded(class_means, 1, 8.0)) / 2
    torch.testing.assert_close(class_means.mean_logits(temperature=8.0), expected)


@pytest.mark.parametrize("ask", ["logits", "mean_logits"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_logits_need_a_temperature_that_is_one(ensemble, ask, temperature):
    with pytest.raises(TemperatureError):
        getattr(ensemble, ask)(temperature=temperature)


@pytest.mark.parametrize(
    ("spec", "depends_on_temperature", "is_normalised"),
    [(Codes(), False, False), (CLASS_MEANS, True, False), (SAMPLES, True, True)],
    ids=str,
)
def test_soft_targets_say_what_their_codec_decodes_to(spec, depends_on_temperature, is_normalised):
    soft_targets = coded(WIDE, spec, ("a", "b"))
    assert (soft_targets.depends_on_temperature, soft_targets.is_normalised) == (depends_on_temperature, is_normalised)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sampled_weights_of_one_teacher_are_given_as_they_are(samples, mean, temperature):
    found = samples.log_probabilities(temperature, mean=mean, teachers=["b"])
    assert torch.equal(found, decoded(samples, 1, temperature))


def test_sampled_weights_are_not_normalised(samples):
    assert float((samples.probabilities(1.0, teachers=["a"]).sum(1) - 1).abs().max()) > 1e-4


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_the_arithmetic_mean_of_sampled_weights_is_that_of_the_weights(samples, weights):
    share = 0.5 if weights is None else 0.75
    expected = share * decoded(samples, 0, 2.0).exp() + (1 - share) * decoded(samples, 1, 2.0).exp()
    found = samples.probabilities(2.0, mean="arithmetic", weights=weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mean", ["geometric", "tempered-arithmetic"])
def test_other_means_of_several_sampled_teachers_are_refused_with_a_remedy(samples, mean):
    with pytest.raises(
        OptionError, match=rf"{mean} mean of 2 teachers .* right on average only.* Use mean='arithmetic'"
    ):
        samples.log_probabilities(2.0, mean=mean)


@pytest.mark.parametrize("teachers", [None, ["a"]])
def test_sampled_soft_targets_have_no_mean_logits(samples, teachers):
    with pytest.raises(OptionError, match=r"no logits to average or to match\. Use a divergence on soft targets"):
        samples.mean_logits(teachers=teachers)


def test_a_merged_cache_of_samples_gives_its_weights():
    merged = coded(WIDE.mean(1, keepdim=True), SAMPLES, ("a",))
    merged = SoftTargets(merged.codes, merged.decoders, ("a", "b"), "geometric")
    assert torch.equal(merged.log_probabilities(2.0), decoded(merged, 0, 2.0))


def test_a_sampled_teacher_beside_one_with_every_logit_keeps_its_weights(samples):
    codes = coded(WIDE, Codes(), ("a", "b"))
    mixed = SoftTargets((samples.codes[0], codes.codes[1]), (samples.decoders[0], codes.decoders[1]), ("a", "b"))
    expected = (decoded(mixed, 0, 2.0).exp() + torch.softmax(decoded(mixed, 1, 2.0), 1)) / 2
    torch.testing.assert_close(mixed.probabilities(2.0, mean="arithmetic"), expected)


def test_a_sampled_row_that_is_not_available_is_nan(samples):
    available = torch.tensor([True, False, True, True, True, True])
    part = SoftTargets(samples.codes, samples.decoders, samples.teacher_names, available=available)
    assert torch.equal(part.probabilities(2.0, teachers=["a"]).isnan().all(1), ~available)


# --- masked classes

INF = float("inf")
MASKING = torch.tensor([[[1.0, -INF, 0.0, 2.0], [0.5, 1.0, -INF, 2.0]]])
"""Two members of one row that mask different classes."""


def test_the_geometric_mean_masks_what_any_member_masks():
    found = log_mean_probabilities(MASKING, temperature=2.0)
    expected = torch.log_softmax(torch.tensor([0.75, -INF, -INF, 2.0]) / 2, dim=0)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("mean", ["arithmetic", "tempered-arithmetic"])
def test_the_arithmetic_means_keep_what_one_member_allows(mean):
    found = log_mean_probabilities(MASKING, temperature=1.0, mean=mean).exp()
    torch.testing.assert_close(found, torch.softmax(MASKING, 2).mean(1))


@pytest.mark.parametrize("mean", MEANS)
def test_a_class_that_all_members_mask_has_no_probability(mean):
    masked = MASKING.index_fill(2, torch.tensor(0), -INF)
    assert log_mean_probabilities(masked, temperature=2.0, mean=mean)[0, 0] == -INF


@pytest.mark.parametrize("mean", MEANS)
def test_a_member_of_weight_0_masks_nothing(mean):
    found = log_mean_probabilities(MASKING, temperature=2.0, mean=mean, weights=[0.0, 3.0])
    torch.testing.assert_close(found, torch.log_softmax(MASKING[:, 1] / 2, dim=1))


def test_members_that_leave_no_class_have_no_geometric_mean():
    apart = torch.tensor([[[0.0, -INF], [-INF, 0.0]]])
    assert log_mean_probabilities(apart, temperature=1.0).isnan().all()


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e6])
def test_a_masked_class_has_no_probability_at_any_temperature(temperature):
    assert soften(MASKING, temperature)[MASKING == -INF].tolist() == [0.0, 0.0]
