from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.errors import JobError
from kdcache.students.side_by_side import LoopedStudents, StackedStudents, make_students, place_side_by_side


class Branching(nn.Module):
    """Its forward pass branches on its input's values, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs):
        logits = self.linear(inputs)
        return logits if bool(logits.sum() > 0) else logits * 2


class Counting(nn.Module):
    """Replaces a buffer in training, which no functional call can see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, inputs):
        if self.training:
            self.num_calls = self.num_calls + 1
        return self.linear(inputs) / (1 + self.num_calls)


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.last(self.second(self.first(inputs).relu()).relu())


@pytest.fixture
def inputs():
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(0))


def make_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_a_student_is_made_with_its_own_seed(make_mlp):
    (student,) = make_students(make_mlp, [7])
    torch.manual_seed(7)
    expected = make_mlp()
    assert torch.equal(student[0].weight, expected[0].weight)


def test_seeds_give_different_students(make_mlp):
    first, second = make_students(make_mlp, [0, 1])
    assert not torch.equal(first[0].weight, second[0].weight)


def test_making_students_leaves_the_global_generator_as_it_was(make_mlp):
    before = torch.get_rng_state()
    make_students(make_mlp, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory_that_gives_no_module_is_refused():
    with pytest.raises(JobError, match=r"gave a dict; expected a torch\.nn\.Module"):
        make_students(dict, [0])


def test_a_factory_that_gives_several_architectures_is_refused():
    widths = iter([4, 5])
    with pytest.raises(JobError, match="other parameters for seed 1 than for seed 0"):
        make_students(lambda: nn.Linear(next(widths), 2), [0, 1])


def test_stacked_and_looped_students_give_the_same_logits(make_mlp, inputs):
    stacked = StackedStudents(make_students(make_mlp, [0, 1, 2]))
    looped = LoopedStudents(make_students(make_mlp, [0, 1, 2]))
    torch.testing.assert_close(stacked(inputs), looped(inputs))


def test_logits_have_the_axes_student_row_class(make_mlp, inputs):
    assert StackedStudents(make_students(make_mlp, [0, 1]))(inputs).shape == (2, 10, 3)


def test_small_students_are_stacked(make_mlp, inputs):
    assert place_side_by_side(make_students(make_mlp, [0, 1]), inputs).way == "stacked"


def test_one_student_is_looped(make_mlp, inputs):
    assert place_side_by_side(make_students(make_mlp, [0]), inputs).way == "looped"


def test_large_students_are_looped_on_a_processor(inputs):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 15_000), nn.ReLU(), nn.Linear(15_000, 3))

    assert place_side_by_side(make_students(make, [0, 1]), inputs).way == "looped"


@pytest.mark.parametrize("make", [make_batch_norm, Counting, Branching])
def test_students_that_cannot_be_stacked_are_looped(make, inputs):
    assert place_side_by_side(make_students(make, [0, 1]), inputs).way == "looped"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_batch_norm, "training changes the buffers .*running_mean"),
        (Counting, "training changes the buffers .*num_calls"),
        (Branching, "vmap refuses them"),
    ],
)
def test_stacking_on_request_is_refused_with_its_reason(make, reason, inputs):
    with pytest.raises(JobError, match=reason):
        place_side_by_side(make_students(make, [0, 1]), inputs, way="stacked")


def test_looping_can_be_asked_for(make_mlp, inputs):
    assert place_side_by_side(make_students(make_mlp, [0, 1]), inputs, way="looped").way == "looped"


def test_trying_to_stack_leaves_the_students_as_they_were(inputs):
    students = place_side_by_side(make_students(make_batch_norm, [0, 1]), inputs)
    fresh = LoopedStudents(make_students(make_batch_norm, [0, 1]))
    torch.testing.assert_close(students.state(), fresh.state(), rtol=0, atol=0)


def test_trying_to_stack_leaves_the_global_generator_as_it_was(inputs):
    modules = make_students(lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, 3)), [0, 1])
    before = torch.get_rng_state()
    place_side_by_side(modules, inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_student_without_a_class_axis_is_refused(inputs):
    with pytest.raises(JobError, match=r"logits of shape \(10,\); expected \[row, class\]"):
        place_side_by_side(make_students(lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), [0, 1]), inputs)


def test_stacked_students_draw_dropout_of_their_own(inputs):
    same = nn.Sequential(nn.Linear(6, 50), nn.Dropout())
    students = StackedStudents([same, same])
    students.train(True)
    first, second = students(inputs)
    assert not torch.equal(first, second)


def test_evaluation_mode_turns_dropout_off(inputs):
    students = StackedStudents(make_students(lambda: nn.Sequential(nn.Linear(6, 50), nn.Dropout()), [0, 1]))
    students.train(False)
    assert torch.equal(students(inputs), students(inputs))


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_a_state_is_stacked_under_the_module_names(kind, make_mlp):
    state = kind(make_students(make_mlp, [0, 1])).state()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "0.weight": (2, 8, 6),
        "0.bias": (2, 8),
        "2.weight": (2, 3, 8),
        "2.bias": (2, 3),
    }


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_a_state_can_be_taken_over(kind, make_mlp, inputs):
    source = kind(make_students(make_mlp, [0, 1]))
    students = kind(make_students(make_mlp, [2, 3]))
    students.load_state(source.state())
    assert torch.equal(students(inputs), source(inputs))


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
@pytest.mark.parametrize("make", [make_batch_norm, Tied])
def test_one_student_comes_out_as_a_module_of_its_own(kind, make, inputs):
    students = kind(make_students(make, [0, 1]))
    students.train(False)
    torch.testing.assert_close(students.module(1)(inputs), students(inputs)[1])


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_a_student_that_came_out_is_a_copy(kind, make_mlp, inputs):
    students = kind(make_students(make_mlp, [0, 1]))
    before = students(inputs)
    nn.init.zeros_(students.module(0)[0].weight)
    assert torch.equal(students(inputs), before)


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_frozen_parameters_are_not_optimised(kind):
    def make() -> nn.Module:
        module = nn.Linear(6, 3)
        module.bias.requires_grad_(False)
        return module

    shapes = {tuple(tensor.shape)[-2:] for tensor in kind(make_students(make, [0, 1])).parameters()}
    assert shapes == {(3, 6)}


def test_inputs_may_be_a_mapping():
    class FromMapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, inputs):
            return self.linear(inputs["pixels"])

    inputs = {"pixels": torch.ones(10, 6)}
    students = place_side_by_side(make_students(FromMapping, [0, 1]), inputs)
    assert (students.way, students(inputs).shape) == ("stacked", (2, 10, 3))
