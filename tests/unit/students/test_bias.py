from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import NonFiniteLogitsError, ShapeError, TransferSetError
from kdcache.students import match_class_frequencies


def masses(logits: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(logits.double() + bias, dim=1).mean(dim=0)


@st.composite
def problems(draw) -> tuple[Tensor, Tensor]:
    """Logits [row, class] of any peakedness and frequencies [class] of any skew above 1e-4."""
    num_rows, num_classes = draw(st.integers(1, 30)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.floats(0, 50))
    logits = torch.randn(num_rows, num_classes, generator=generator) * spread
    frequencies = torch.rand(num_classes, generator=generator) ** draw(st.integers(1, 6)) + 1e-4
    return logits, frequencies / frequencies.sum()


@given(problems())
def test_every_class_gets_its_frequency(problem):
    logits, frequencies = problem
    bias = match_class_frequencies(logits, frequencies)
    torch.testing.assert_close(masses(logits, bias).float(), frequencies, rtol=0, atol=3e-5)


@given(problems(), st.data())
def test_the_corrected_classes_get_their_frequencies(problem, data):
    logits, frequencies = problem
    num_classes = len(frequencies)
    classes = data.draw(st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=num_classes - 1))
    bias = match_class_frequencies(logits, frequencies, classes=sorted(classes))
    chosen = sorted(classes)
    torch.testing.assert_close(masses(logits, bias).float()[chosen], frequencies[chosen], rtol=0, atol=3e-5)


@given(problems(), st.data())
def test_the_other_classes_keep_their_logits(problem, data):
    logits, frequencies = problem
    corrected = data.draw(st.integers(0, len(frequencies) - 1))
    bias = match_class_frequencies(logits, frequencies, classes=[corrected])
    assert bias.count_nonzero() <= 1
    assert bias[torch.arange(len(bias)) != corrected].tolist() == [0.0] * (len(bias) - 1)


@given(problems())
def test_the_bias_of_all_classes_has_mean_0(problem):
    bias = match_class_frequencies(*problem)
    assert float(bias.mean()) == pytest.approx(0, abs=1e-4)


@given(problems(), st.integers(-50, 50))
@example((torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([0.2, 0.3, 0.5])), 5)
def test_a_shift_of_the_logits_changes_nothing(problem, shift):
    logits, frequencies = problem
    bias = match_class_frequencies(logits + shift, frequencies)
    torch.testing.assert_close(masses(logits, bias).float(), frequencies, rtol=0, atol=2e-4)


def test_logits_that_match_already_need_no_bias():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bias = match_class_frequencies(logits, torch.tensor([0.5, 0.5]))
    assert bias.tolist() == [0.0, 0.0]


def test_the_bias_of_one_row_is_known_in_closed_form():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    bias = match_class_frequencies(logits, torch.tensor([0.5, 0.0, 0.0]), classes=[0])
    assert float(bias[0]) == pytest.approx(math.log(2) - 2, abs=1e-5)


def test_a_class_that_was_never_seen_gets_its_share_back():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4000,), generator=generator)
    evidence = torch.randn(4000, 4, generator=generator) + 4 * torch.nn.functional.one_hot(labels, 4)
    unseen = evidence - torch.tensor([0.0, 0.0, 0.0, 6.0])
    bias = match_class_frequencies(unseen, torch.full((4,), 0.25), classes=[3])
    assert float(bias[3]) == pytest.approx(6.0, abs=0.2)


def test_frequencies_need_not_sum_to_1_exactly():
    bias = match_class_frequencies(torch.zeros(2, 3), torch.tensor([0.33333, 0.33333, 0.33333]))
    assert bias.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_logits_of_lower_precision_are_accepted():
    bias = match_class_frequencies(torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor([0.25, 0.75]))
    assert float(bias[1] - bias[0]) == pytest.approx(math.log(3), abs=1e-5)


def test_the_logits_stay_as_they_were():
    logits = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    match_class_frequencies(logits, torch.tensor([0.5, 0.5]))
    assert logits.tolist() == [[3.0, 0.0], [1.0, 0.0]]


def test_many_classes_are_scaled_into_place():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1100, generator=generator)
    frequencies = torch.rand(1100, generator=generator) + 0.5
    frequencies = frequencies / frequencies.sum()
    bias = match_class_frequencies(logits, frequencies, tolerance=1e-5)
    torch.testing.assert_close(masses(logits, bias).float(), frequencies, rtol=0, atol=3e-5)


def test_a_frequency_of_0_is_impossible():
    with pytest.raises(TransferSetError, match=r"classes \[1\] have frequency 0 or less"):
        match_class_frequencies(torch.zeros(2, 3), torch.tensor([0.5, 0.0, 0.5]))


def test_a_frequency_of_0_is_allowed_where_nothing_is_corrected():
    bias = match_class_frequencies(torch.zeros(2, 3), torch.tensor([0.5, 0.0, 0.5]), classes=[0])
    assert float(bias[0]) == pytest.approx(math.log(2), abs=1e-5)


def test_a_frequency_that_is_no_number_is_impossible():
    with pytest.raises(TransferSetError, match=r"classes \[0\] have frequency 0 or less"):
        match_class_frequencies(torch.zeros(2, 2), torch.tensor([torch.nan, 1.0]))


def test_frequencies_of_all_classes_must_sum_to_1():
    with pytest.raises(TransferSetError, match=r"sum to 0\.900000; expected 1"):
        match_class_frequencies(torch.zeros(2, 2), torch.tensor([0.5, 0.4]))


@pytest.mark.parametrize("second", [0.5, 0.7])
def test_something_must_be_left_for_the_other_classes(second):
    with pytest.raises(TransferSetError, match="leaves nothing for the 1 other classes"):
        match_class_frequencies(torch.zeros(2, 3), torch.tensor([0.5, second, 0.0]), classes=[0, 1])


def test_a_class_that_does_not_exist_is_refused():
    with pytest.raises(TransferSetError, match=r"classes \[-1, 5\] do not exist; the logits have classes 0 to 2"):
        match_class_frequencies(torch.zeros(2, 3), torch.full((3,), 1 / 3), classes=[5, -1, 0])


def test_no_classes_at_all_are_refused():
    with pytest.raises(TransferSetError, match="classes is empty"):
        match_class_frequencies(torch.zeros(2, 3), torch.full((3,), 1 / 3), classes=[])


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 2, 3)])
def test_logits_must_be_rows_of_classes(shape):
    with pytest.raises(ShapeError, match=r"expected \[row, class\] with at least one row"):
        match_class_frequencies(torch.zeros(shape), torch.full((3,), 1 / 3))


def test_frequencies_must_fit_the_classes():
    with pytest.raises(ShapeError, match=r"have shape \(2,\); the logits have 3 classes"):
        match_class_frequencies(torch.zeros(2, 3), torch.full((2,), 0.5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(3, 2)
    logits[1, 0] = value
    with pytest.raises(NonFiniteLogitsError, match="row 1"):
        match_class_frequencies(logits, torch.tensor([0.5, 0.5]))


def test_a_class_that_must_take_nearly_all_mass_gets_it():
    logits = torch.tensor([[12.7, -13.0], [6.2, -5.8], [11.5, -11.8], [-5.2, -3.8], [12.8, 2.2]])
    bias = match_class_frequencies(logits, torch.tensor([0.0033, 0.9967]), classes=[1])
    assert float(torch.softmax(logits + bias, dim=1).mean(dim=0)[1]) == pytest.approx(0.9967, abs=1e-5)
