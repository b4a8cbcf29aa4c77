"""The networks have the paper's shape, and dropout and the weight constraint do what they say."""

from __future__ import annotations

import pytest
import torch

from jobs.mnist.models import ByteDropout, constrain_incoming_norms, mlp, student, teacher
from kdcache.errors import JobError


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_a_student_has_two_hidden_layers() -> None:
    assert shapes(student(30)) == {
        "linear_0.weight": (30, 784),
        "linear_0.bias": (30,),
        "linear_1.weight": (30, 30),
        "linear_1.bias": (30,),
        "linear_2.weight": (10, 30),
        "linear_2.bias": (10,),
    }


def test_dropout_changes_no_parameter_name() -> None:
    assert shapes(teacher(units=30)) == shapes(student(30))


def test_a_student_has_no_dropout() -> None:
    assert not [module for module in student(30).modules() if isinstance(module, ByteDropout)]


def test_a_teacher_drops_inputs_and_both_hidden_layers() -> None:
    dropouts = [module.probability for module in teacher(units=30).modules() if isinstance(module, ByteDropout)]
    assert dropouts == [0.2, 0.5, 0.5]


def test_the_output_is_not_rectified() -> None:
    model = mlp((4, 3, 2))
    torch.nn.init.constant_(model.get_parameter("linear_1.bias"), -100.0)
    assert bool((model(torch.ones(1, 4)) < 0).all())


@pytest.mark.parametrize("widths", [(), (784,), (784, 0, 10)])
def test_widths_that_make_no_network_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(JobError, match="two or more positive numbers"):
        mlp(widths)


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_a_dropout_probability_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(JobError, match="0 <= probability < 1"):
        ByteDropout(probability)


def test_dropout_is_the_identity_in_evaluation_mode() -> None:
    activations = torch.randn(5, 7)
    assert torch.equal(ByteDropout(0.5).eval()(activations), activations)


def test_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    assert ByteDropout(0.2)(torch.ones(1000, 1000)).mean().item() == pytest.approx(1.0, abs=3e-3)


def test_dropout_drops_the_fraction_asked_for() -> None:
    torch.manual_seed(0)
    dropped = (ByteDropout(0.5)(torch.ones(1000, 1000)) == 0).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=3e-3)


def test_every_byte_of_a_word_is_random() -> None:
    torch.manual_seed(0)
    dropped_by_position = (ByteDropout(0.5)(torch.ones(10_000, 8)) == 0).float().mean(dim=0)
    assert dropped_by_position.tolist() == pytest.approx([0.5] * 8, abs=0.03)


def test_dropout_works_on_a_size_that_fills_no_word() -> None:
    assert ByteDropout(0.5)(torch.ones(3, 3)).shape == (3, 3)


def test_dropout_repeats_with_the_seed() -> None:
    dropout = ByteDropout(0.5)
    torch.manual_seed(1)
    first = dropout(torch.ones(50))
    torch.manual_seed(1)
    assert torch.equal(dropout(torch.ones(50)), first)


def test_gradients_pass_kept_units_only() -> None:
    activations = torch.ones(200, requires_grad=True)
    dropped = ByteDropout(0.5)(activations)
    dropped.sum().backward()
    torch.testing.assert_close(activations.grad, dropped.detach())


def test_long_weight_vectors_are_shortened_to_the_constraint() -> None:
    layer = torch.nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]])
    constrain_incoming_norms(layer, max_norm=1.0)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0.6, 0.8, 0.0], [0.3, 0.4, 0.0]]))


def test_a_constraint_that_is_not_positive_is_refused() -> None:
    with pytest.raises(JobError, match="max_norm"):
        constrain_incoming_norms(torch.nn.Linear(3, 2), max_norm=0.0)
