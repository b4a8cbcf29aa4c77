"""What the topk codec promises for any logits: probabilities, masks, holes, and what its samples expect."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdcache.codecs import parameters_to
from kdcache.codecs.topk import TopKCodec
from kdcache.documents.codec_specs import TopK

MASKED = float("-inf")
common = settings(max_examples=60, deadline=None)

specs = st.builds(
    TopK,
    k=st.integers(1, 20),
    tail=st.sampled_from(["class-means", "samples"]),
    step=st.sampled_from([2.0**-6, 0.1, 0.125, 1.0]),
    num_nodes=st.integers(2, 14),
    num_samples=st.integers(1, 20),
    sample_temperature=st.sampled_from([0.5, 1.0, 2.0, 7.3]),
    seed=st.integers(0, 2**31 - 1),
)
temperatures = st.floats(0.05, 1e4)


@st.composite
def bells(draw, num_rows=8, max_scale=4.0):
    """Rows of bell-shaped logits around class means, of up to 2,000 classes."""
    num_classes = draw(st.sampled_from([2, 3, 17, 100, 2000]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.floats(0.01, max_scale)) / 2**0.5
    means = generator.standard_normal(num_classes)
    rows = (means + generator.standard_normal((num_rows, num_classes))) * scale
    return torch.from_numpy((rows + draw(st.sampled_from([0.0, 100.0, -3000.0]))).astype(np.float32))


@st.composite
def hostile(draw, num_rows=5):
    """Rows with ties, outliers of any size, few classes, clumps, and masks that are the same in every row or not."""
    num_classes = draw(st.integers(1, 40))
    values = st.one_of(
        st.floats(-30, 30, width=32),
        st.sampled_from([0.0, 1.0, -60.0, -1e4, 1e4, -1e6, 1e6]),
        st.floats(-(2.0**100), 2.0**100, width=32),
    )
    rows = torch.from_numpy(draw(arrays.arrays(np.float32, (num_rows, num_classes), elements=values)))
    mask = torch.from_numpy(draw(arrays.arrays(np.bool_, (num_rows, num_classes))))
    kind = draw(st.sampled_from(["none", "static", "any"]))
    mask = {"none": mask & False, "static": mask[:1].expand_as(mask), "any": mask}[kind].clone()
    mask[:, draw(st.integers(0, num_classes - 1))] = False
    return rows.masked_fill(mask, MASKED)


def coded(logits, spec):
    codec = TopKCodec(spec, logits.shape[1])
    if not codec.is_normalised:
        masked = logits.amax(1, keepdim=True) - logits > codec.reach
        assume(bool((masked == masked[:1]).all()))
    parameters = parameters_to(codec.fit(logits), "cpu")
    codec.check_parameters(parameters)
    return codec, parameters, codec.encode(logits, parameters)


def log_weights(codec, codes, parameters, temperature):
    return codec.decode(codes, parameters, temperature=temperature).double() / temperature


@common
@given(bells(), st.integers(1, 16), st.floats(0.7, 1e3))
def test_the_tail_of_bell_shaped_rows_is_right_within_a_hundredth(logits, k, temperature):
    codec, parameters, codes = coded(logits, TopK(k=k))
    errors = codec.log_partition_error(logits, codes, parameters, temperature=temperature)
    assert float(errors.abs().amax()) < 0.01


@common
@given(bells(), st.integers(1, 16), st.floats(0.5, 0.7))
def test_down_to_one_half_it_is_right_within_a_quarter(logits, k, temperature):
    codec, parameters, codes = coded(logits, TopK(k=k))
    errors = codec.log_partition_error(logits, codes, parameters, temperature=temperature)
    assert float(errors.abs().amax()) < 0.25


@common
@given(bells(), specs, st.floats(0.7, 1e3))
def test_kept_classes_are_right_but_for_their_rounding_and_the_log_partition(logits, spec, temperature):
    codec, parameters, codes = coded(logits, spec)
    top = logits.double().argmax(1, keepdim=True)
    true = torch.log_softmax(logits.double() / temperature, 1).gather(1, top)[:, 0]
    found = log_weights(codec, codes, parameters, temperature).gather(1, top)[:, 0]
    allowed = codec.log_partition_error(logits, codes, parameters, temperature=temperature).abs()
    rounding = 2.2 * spec.step / temperature  # half the spacing at the weakest class that can matter
    assert bool(((found - true).abs() <= allowed + rounding + 1e-4).all())


@common
@given(hostile(), specs, temperatures)
def test_class_means_are_normalised_and_mask_nothing_else(logits, spec, temperature):
    codec, parameters, codes = coded(logits, spec.model_copy(update={"tail": "class-means"}))
    decoded = codec.decode(codes, parameters, temperature=temperature)
    masked = logits.amax(1, keepdim=True) - logits > codec.reach
    assert torch.equal(decoded == MASKED, masked)
    totals = torch.logsumexp(decoded.double() / temperature, 1)
    assert float(totals.abs().amax()) < 1e-3


@common
@given(hostile(), specs, temperatures)
def test_samples_mask_what_was_masked_and_decode_to_numbers(logits, spec, temperature):
    codec, parameters, codes = coded(logits, spec.model_copy(update={"tail": "samples"}))
    decoded = codec.decode(codes, parameters, temperature=temperature)
    assert not decoded.isnan().any()
    assert not (decoded == float("inf")).any()
    assert bool((decoded[logits == MASKED] == MASKED).all())


@common
@given(hostile(), specs)
def test_kept_classes_are_the_largest_and_the_lowest_among_equals(logits, spec):
    codec, parameters, codes = coded(logits, spec)
    fields = codec.columns.unpack(codes)
    classes = parameters["class_of_rank"][fields["kept_class"].add(1).cumsum(1).sub(1).clamp(max=logits.shape[1] - 1)]
    gaps = (logits.amax(1, keepdim=True) - logits).double()
    expected = gaps.float().sort(dim=1, stable=True).indices[:, : spec.k]
    for row in range(len(logits)):
        unmasked = int((gaps[row].float() <= codec.reach).sum())
        present = fields["kept_gap"][row] != 65534
        assert sorted(classes[row][present].tolist()) == sorted(expected[row][:unmasked].tolist())


@common
@given(hostile(), specs)
def test_no_row_that_exists_reads_as_a_hole(logits, spec):
    codec, _, codes = coded(logits, spec)
    assert not codec.is_fill(codes).any()


@common
@given(hostile(), specs)
def test_rows_are_coded_independently(logits, spec):
    codec, parameters, codes = coded(logits, spec)
    assert torch.equal(codec.encode(logits[3:4], parameters), codes[3:4])


@common
@given(arrays.arrays(np.uint16, (4, 160)), specs, temperatures)
def test_any_codes_decode_without_an_error(drawn, spec, temperature):
    codec = TopKCodec(spec, 30)
    parameters = parameters_to(codec.fit(torch.randn(50, 30, generator=torch.Generator().manual_seed(0))), "cpu")
    codes = torch.from_numpy(drawn)[:, : codec.num_columns].contiguous()
    assert codec.decode(codes, parameters, temperature=temperature).shape == (4, 30)


@common
@given(bells(), st.integers(0, 2**31 - 1))
def test_a_sample_depends_on_the_row_and_the_seed_alone(logits, seed):
    codec, parameters, codes = coded(logits, TopK(tail="samples", seed=seed, k=1, num_samples=4))
    assert torch.equal(codec.encode(logits.double() + 64.0, parameters), codec.encode(logits.double(), parameters))
    assert torch.equal(codec.encode(logits.flip(0), parameters), codes.flip(0))


SEEDS = 400
STATISTICS = [4.0, *(pytest.param(temperature, marks=pytest.mark.slow) for temperature in (1.0, 1.5, 2.0, 8.0))]


def rows_of_levels(num_rows=24, num_classes=60):
    """Rows whose gaps are levels of step 1/16, so that coding rounds none."""
    codes = torch.randint(0, 140, (num_rows, num_classes), generator=torch.Generator().manual_seed(3))
    codes[:, 0] = 0
    distances = codes.double() / 16
    return -distances * (1 + distances / 8)


def draws_of_samples(logits, temperature):
    spec = TopK(k=4, tail="samples", num_samples=6, step=2.0**-4)
    parameters = parameters_to(TopKCodec(spec, logits.shape[1]).fit(logits), "cpu")
    draws = []
    for seed in range(SEEDS):
        codec = TopKCodec(spec.model_copy(update={"seed": seed}), logits.shape[1])
        draws.append(log_weights(codec, codec.encode(logits, parameters), parameters, temperature).exp())
    return torch.stack(draws)


def draws_of_powered_counts(logits, temperature):
    """What random-sampling KD keeps, counts of 50 draws from the soft targets at 1, moved to another temperature."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(SEEDS):
        classes = torch.multinomial(torch.softmax(logits, 1), 50, replacement=True, generator=generator)
        counts = torch.zeros_like(logits).scatter_add_(1, classes, torch.ones(classes.shape, dtype=logits.dtype))
        powered = counts ** (1 / temperature)
        draws.append(powered / powered.sum(1, keepdim=True))
    return torch.stack(draws)


def scores(draws, logits, temperature):
    """Z-scores of the mean over seeds of random functions of the class: [row, function], and pooled over the rows."""
    functions = torch.randn(logits.shape[1], 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    errors = (draws - torch.softmax(logits / temperature, 1)) @ functions
    pooled = errors.mean(1)
    return tuple(values.mean(0) / (values.std(0) / SEEDS**0.5) for values in (errors, pooled))


@pytest.mark.parametrize("temperature", STATISTICS)
def test_samples_are_unbiased_at_every_temperature(temperature):
    logits = rows_of_levels()
    each, pooled = scores(draws_of_samples(logits, temperature), logits, temperature)
    assert 0.8 < float((each**2).mean()) < 1.25
    assert float(pooled.abs().amax()) < 4


@pytest.mark.parametrize("temperature", STATISTICS)
def test_each_class_is_drawn_with_its_inclusion_probability(temperature):
    logits = rows_of_levels()
    draws = draws_of_samples(logits, temperature)
    true = torch.softmax(logits / temperature, 1)
    often = (draws > 0).double().mean(0) > 0.02
    z = (draws.mean(0) - true) / (draws.std(0) / SEEDS**0.5 + 1e-3 * true)
    assert 0.8 < float((z[often] ** 2).mean()) < 1.25


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0, 8.0])
def test_counts_to_a_power_are_biased_at_every_other_temperature(temperature):
    logits = rows_of_levels()
    each, pooled = scores(draws_of_powered_counts(logits, temperature), logits, temperature)
    assert float((each**2).mean()) > 20
    assert float(pooled.abs().amax()) > 20


def test_counts_are_unbiased_at_the_temperature_they_were_drawn_at():
    logits = rows_of_levels()
    each, pooled = scores(draws_of_powered_counts(logits, 1.0), logits, 1.0)
    assert 0.8 < float((each**2).mean()) < 1.25
    assert float(pooled.abs().amax()) < 4
