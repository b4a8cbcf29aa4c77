"""What holds for the soft targets of any ensemble at any temperature."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdcache.codecs import (
    Decoder,
    codec_for,
    error_range,
    kl_bound,
    measure,
    parameters_to,
    total_variation_bound,
)
from kdcache.documents import Codes, Lossless
from kdcache.losses import distillation_loss, forward_kl
from kdcache.soft_targets import MEANS, SoftTargets, log_mean_probabilities

temperatures = st.floats(0.05, 1000)
means = st.sampled_from(MEANS)
common = settings(max_examples=25, deadline=None)


@st.composite
def members(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 12)))
    return torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=st.floats(-60, 60, width=32))))


@st.composite
def weighted_members(draw):
    logits = draw(members())
    weight = st.floats(0, 10).filter(lambda value: value == 0 or value > 1e-3)
    weights = draw(st.lists(weight, min_size=logits.shape[1], max_size=logits.shape[1]).filter(any))
    return logits, weights


def batch(logits, spec):
    codec = codec_for(spec, logits.shape[-1])
    decoders = tuple(Decoder(codec, parameters_to(codec.fit(member), "cpu")) for member in logits.unbind(1))
    codes = tuple(
        codec.encode(member, decoder.parameters) for member, decoder in zip(logits.unbind(1), decoders, strict=True)
    )
    return SoftTargets(codes, decoders, tuple(f"teacher-{index}" for index in range(len(codes))))


@common
@given(weighted_members(), temperatures, means)
def test_soft_targets_are_a_distribution(case, temperature, mean):
    logits, weights = case
    found = log_mean_probabilities(logits, temperature=temperature, mean=mean, weights=weights).exp()
    torch.testing.assert_close(found.sum(1), torch.ones(len(logits)), rtol=1e-5, atol=1e-5)


def test_small_losses_of_two_teachers_can_be_a_large_one_of_their_geometric_mean():
    """Why a measured KL bounds no mean, and an error range does: both teachers err where they are sure."""
    logits = torch.tensor([[0.0, -12.0], [-12.0, 0.0]], dtype=torch.float64)
    decoded = logits + torch.tensor([0.0, 0.5], dtype=torch.float64)
    alone = float(measure(logits, decoded, [1.0]).max())
    together = float(measure(logits.mean(0, keepdim=True), decoded.mean(0, keepdim=True), [1.0]))
    assert alone < 1e-6
    assert 1e-2 < together <= float(kl_bound(error_range(logits, decoded).max(), 1.0))


@common
@given(weighted_members(), temperatures, means, st.floats(0, 4), st.integers(0, 2**32 - 1))
def test_the_bounds_of_the_largest_error_range_hold_for_means(case, temperature, mean, size, seed):
    logits, weights = case[0].double(), case[1]
    errors = size * (torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5)
    true, coded = (
        log_mean_probabilities(values, temperature=temperature, mean=mean, weights=weights)
        for values in (logits, logits + errors)
    )
    largest = error_range(logits.flatten(0, 1), (logits + errors).flatten(0, 1)).max()
    widest = 2 * largest if mean == "tempered-arithmetic" else largest
    assert float(measure(true, coded, [1.0]).max()) <= float(kl_bound(widest, temperature)) + 1e-12
    variation = (true.exp() - coded.exp()).abs().sum(1).max() / 2
    assert float(variation) <= float(total_variation_bound(widest, temperature)) + 1e-12


@common
@given(weighted_members(), temperatures, means, st.floats(-50, 50))
def test_soft_targets_see_no_shift_of_a_teachers_row(case, temperature, mean, shift):
    logits, weights = (case[0].double(), case[1])
    shifts = torch.linspace(-shift, shift, logits.shape[1], dtype=torch.float64)[:, None]
    plain, shifted = (
        log_mean_probabilities(values, temperature=temperature, mean=mean, weights=weights).exp()
        for values in (logits, logits + shifts)
    )
    torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-9)


@common
@given(weighted_members(), temperatures, means, st.floats(0.01, 100))
def test_only_the_proportions_of_the_weights_matter(case, temperature, mean, factor):
    logits, weights = case
    plain, scaled = (
        log_mean_probabilities(logits.double(), temperature=temperature, mean=mean, weights=values).exp()
        for values in (weights, [weight * factor for weight in weights])
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


@common
@given(members(), temperatures, means)
def test_teachers_that_agree_are_their_own_mean(logits, temperature, mean):
    agreeing = logits[:, :1].expand(-1, 3, -1).double()
    found = log_mean_probabilities(agreeing, temperature=temperature, mean=mean).exp()
    torch.testing.assert_close(found, torch.softmax(agreeing[:, 0] / temperature, 1), rtol=1e-7, atol=1e-10)


@common
@given(weighted_members(), temperatures)
def test_the_arithmetic_mean_lies_between_its_teachers(case, temperature):
    logits, weights = (case[0].double(), case[1])
    each = torch.softmax(logits / temperature, 2)
    found = log_mean_probabilities(logits, temperature=temperature, mean="arithmetic", weights=weights).exp()
    assert bool((found <= each.amax(1) + 1e-12).all())
    assert bool((found >= each.amin(1) - 1e-12).all())


@common
@given(weighted_members(), temperatures, means)
def test_a_lossless_batch_gives_the_soft_targets_of_the_live_teachers(case, temperature, mean):
    logits, weights = case
    found = batch(logits, Lossless()).log_probabilities(temperature, mean=mean, weights=weights)
    expected = log_mean_probabilities(logits, temperature=temperature, mean=mean, weights=weights)
    assert torch.equal(found, expected)


@common
@given(weighted_members(), temperatures, means, st.sampled_from(["uint8", "uint16"]))
def test_a_coded_batch_errs_no_more_in_log_odds_than_its_teachers_error_range(case, temperature, mean, dtype):
    logits, weights = case
    soft_targets = batch(logits, Codes(dtype=dtype))
    bounds = [
        decoder.codec.error_range_bound(codes, decoder.parameters)
        for codes, decoder in zip(soft_targets.codes, soft_targets.decoders, strict=True)
    ]
    found = soft_targets.log_probabilities(temperature, mean=mean, weights=weights)
    expected = log_mean_probabilities(logits, temperature=temperature, mean=mean, weights=weights)
    largest = (torch.stack(bounds).amax(0) / temperature)[:, None]
    # every mean is a function of the members' log-odds that no error range can leave by more than its own width;
    # tempering adds the width at temperature 1, divided by the temperature afterwards
    allowed = 2 * largest if mean == "tempered-arithmetic" else largest
    rounding = 1e-5 * (1 + expected.abs())
    assert bool(((found - expected).abs() <= allowed + rounding).all())


@common
@given(
    members(), st.lists(st.integers(0, 3), max_size=6), st.sampled_from([Lossless(), Codes(), Codes(dtype="uint16")])
)
def test_selecting_rows_before_decoding_or_after_is_the_same(logits, positions, spec):
    index = torch.tensor([position % len(logits) for position in positions], dtype=torch.int64)
    soft_targets = batch(logits, spec)
    assert torch.equal(soft_targets.rows(index).logits(), soft_targets.logits()[index])


@common
@given(weighted_members(), temperatures, means, st.integers(1, 60), st.integers(1, 60))
def test_blocks_of_any_size_give_the_same_soft_targets(case, temperature, mean, decoded_elements, softened_elements):
    logits, weights = case
    soft_targets = batch(logits, Codes())
    expected = soft_targets.log_probabilities(temperature, mean=mean, weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.soft_targets.batch._DECODED_ELEMENTS", decoded_elements)
        patch.setattr("kdcache.soft_targets.means.BLOCK_ELEMENTS", softened_elements)
        found = soft_targets.log_probabilities(temperature, mean=mean, weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@common
@given(members(), temperatures, st.integers(1, 60))
def test_row_blocks_are_the_batch_cut_in_order(logits, temperature, max_elements):
    soft_targets = batch(logits, Codes())
    whole = soft_targets.probabilities(temperature)
    for rows, block in soft_targets.row_blocks(max_elements=max_elements):
        assert len(block) == 1 or block.logits().numel() <= max_elements
        torch.testing.assert_close(block.probabilities(temperature), whole[rows], rtol=1e-6, atol=1e-7)


@common
@given(
    members(),
    temperatures,
    st.sampled_from(["forward-kl", "cross-entropy", "logit-matching"]),
    st.floats(0, 1),
    st.integers(1, 60),
)
def test_blocks_of_any_size_give_the_same_loss_and_gradient(logits, temperature, divergence, soft_weight, elements):
    student = logits[:, 0].double().requires_grad_()
    labels = torch.zeros(len(logits), dtype=torch.int64)
    options = {"temperature": temperature, "divergence": divergence, "soft_weight": soft_weight}
    expected = distillation_loss(student, logits.double(), labels, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.soft_targets.means.BLOCK_ELEMENTS", elements)
        found = distillation_loss(student, logits.double(), labels, **options)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12 * max(1.0, temperature**2))


@common
@given(members(), temperatures)
def test_forward_kl_is_the_divergence_and_not_negative(logits, temperature):
    student, teacher = (torch.log_softmax(values.double() / temperature, 1) for values in (logits[:, 0], logits[:, -1]))
    found = forward_kl(student, teacher)
    torch.testing.assert_close(found, (teacher.exp() * (teacher - student)).sum(1), rtol=1e-9, atol=1e-12)
    assert bool((found >= -1e-15).all())


@common
@given(members(), temperatures, st.sampled_from(["forward-kl", "cross-entropy", "logit-matching"]))
def test_losses_and_gradients_are_finite_for_any_finite_logits(logits, temperature, divergence):
    student = logits[:, 0].clone().requires_grad_()
    loss = distillation_loss(student, logits, temperature=temperature, soft_weight=1.0, divergence=divergence)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
