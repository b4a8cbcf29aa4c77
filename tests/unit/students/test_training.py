from __future__ import annotations

import pytest
import torch
from torch import nn

import kdcache
from kdcache.documents import Optimizer
from kdcache.students import line_up
from kdcache.students.side_by_side import LoopedStudents, StackedStudents, make_students
from kdcache.students.training import Training, learning_rate_factor, make_optimizer

OPTIMIZERS = [
    Optimizer(kind="adam", learning_rate=0.05),
    Optimizer(kind="adamw", learning_rate=0.05, weight_decay=0.1, schedule="linear"),
    Optimizer(kind="sgd", learning_rate=0.1, weight_decay=0.01),
    Optimizer(kind="sgd", learning_rate=0.1, momentum=0.0, schedule="constant"),
]


def trained(kind, sweep, make_student, loader) -> Training:
    """Train a whole sweep."""
    seeds = [student.seed for student in line_up(sweep)]
    students = kind(make_students(make_student, seeds))
    training = Training(sweep, students, num_batches=len(loader))
    for epoch in range(sweep.epochs):
        loader.set_epoch(epoch)
        training.run_epoch(loader)
    return training


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda options: f"{options.kind}-{options.schedule}")
def test_stacked_and_looped_students_come_out_equal(make_sweep, make_mlp, loader, optimizer):
    sweep = make_sweep(temperatures=(1.0, 4.0), soft_weights=(0.0, 0.9), seeds=(0, 1), optimizer=optimizer)
    stacked = trained(StackedStudents, sweep, make_mlp, loader)
    looped = trained(LoopedStudents, sweep, make_mlp, loader)
    torch.testing.assert_close(stacked.students.state(), looped.students.state(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda options: f"{options.kind}-{options.schedule}")
def test_a_student_comes_out_as_a_plain_loop_would_train_it_alone(make_sweep, make_mlp, loader, kind, optimizer):
    sweep = make_sweep(temperatures=(1.0, 4.0), soft_weights=(0.9,), seeds=(0, 1), optimizer=optimizer)
    alone = train_alone(make_mlp, loader, optimizer=optimizer, seed=1, temperature=4.0)
    side_by_side = trained(kind, sweep, make_mlp, loader).students.module(3)
    torch.testing.assert_close(dict(side_by_side.state_dict()), dict(alone.state_dict()), rtol=1e-4, atol=1e-5)


def train_alone(make_student, loader, *, optimizer: Optimizer, seed: int, temperature: float) -> nn.Module:
    """Train one student with torch's own optimisers and schedules, as anybody would write it."""
    torch.manual_seed(seed)
    student = make_student()
    own = {
        "adam": lambda: torch.optim.Adam(student.parameters(), lr=optimizer.learning_rate),
        "adamw": lambda: torch.optim.AdamW(
            student.parameters(), lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay
        ),
        "sgd": lambda: torch.optim.SGD(
            student.parameters(),
            lr=optimizer.learning_rate,
            momentum=optimizer.momentum,
            nesterov=optimizer.momentum > 0,
            weight_decay=optimizer.weight_decay,
        ),
    }[optimizer.kind]()
    num_steps = 3 * len(loader)
    schedule = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(own, factor=1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(own, num_steps),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(own, 1.0, 1e-30, num_steps),
    }[optimizer.schedule]()
    for epoch in range(3):
        loader.set_epoch(epoch)
        for inputs, labels, soft_targets in loader:
            own.zero_grad()
            kdcache.distillation_loss(
                student(inputs), soft_targets, labels, temperature=temperature, soft_weight=0.9
            ).backward()
            own.step()
            schedule.step()
    return student


def test_training_lowers_the_loss(make_sweep, make_mlp, loader):
    sweep = make_sweep(temperatures=(1.0, 4.0))
    training = Training(sweep, StackedStudents(make_students(make_mlp, [0, 0])), num_batches=len(loader))
    losses = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        losses.append(training.run_epoch(loader).total)
    assert losses[2] < losses[0]


def test_an_epoch_reports_the_mean_over_its_rows(make_sweep, make_mlp, world):
    sweep = make_sweep(optimizer=Optimizer(kind="sgd", learning_rate=1e-30))
    loader = kdcache.SoftTargetLoader(world.cache, world.transfer_set, batch_size=16)
    whole = next(iter(kdcache.SoftTargetLoader(world.cache, world.transfer_set, batch_size=40)))
    students = LoopedStudents(make_students(make_mlp, [0]))
    logits = students(whole[0])[0]
    losses = Training(sweep, students, num_batches=len(loader)).run_epoch(loader)
    expected = kdcache.distillation_loss(logits, whole[2], whole[1], temperature=4.0, soft_weight=0.9)
    assert losses.total == pytest.approx([float(expected.detach())], rel=1e-5)


def test_an_epoch_counts_its_batches_aloud(make_sweep, make_mlp, loader):
    training = Training(make_sweep(), LoopedStudents(make_students(make_mlp, [0])), num_batches=len(loader))
    counted = []
    training.run_epoch(loader, on_batch=counted.append)
    assert counted == [1, 2, 3]


def test_training_leaves_the_global_generator_as_it_was(make_sweep, loader):
    students = LoopedStudents(make_students(lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, 3)), [0]))
    before = torch.get_rng_state()
    Training(make_sweep(), students, num_batches=len(loader)).run_epoch(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_the_same_whatever_was_drawn_before(make_sweep, loader):
    def run() -> dict[str, torch.Tensor]:
        return trained(
            StackedStudents,
            make_sweep(seeds=(0, 1)),
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)),
            loader,
        ).students.state()

    first = run()
    torch.rand(3)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)


def test_a_state_goes_on_to_the_same_bits(make_sweep, make_mlp, loader):
    sweep = make_sweep(temperatures=(1.0, 4.0), optimizer=Optimizer(kind="adam", learning_rate=0.05))
    undisturbed = trained(StackedStudents, sweep, make_mlp, loader)
    first = Training(sweep, StackedStudents(make_students(make_mlp, [0, 0])), num_batches=len(loader))
    loader.set_epoch(0)
    first.run_epoch(loader)
    second = Training(sweep, StackedStudents(make_students(make_mlp, [5, 5])), num_batches=len(loader))
    second.load_state(1, *first.state())
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        second.run_epoch(loader)
    torch.testing.assert_close(second.students.state(), undisturbed.students.state(), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_schedule_begins_at_the_full_rate(schedule):
    assert learning_rate_factor(schedule, 0, 10) == 1.0


@pytest.mark.parametrize(("schedule", "half_way"), [("constant", 1.0), ("cosine", 0.5), ("linear", 0.5)])
def test_a_schedule_half_way(schedule, half_way):
    assert learning_rate_factor(schedule, 5, 10) == pytest.approx(half_way)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)])
def test_a_schedule_reaches_its_end_after_the_last_step(schedule, end):
    assert learning_rate_factor(schedule, 10, 10) == pytest.approx(end)


def test_sgd_is_nesterov_with_momentum():
    optimizer = make_optimizer(Optimizer(kind="sgd", momentum=0.8), [torch.zeros(1, requires_grad=True)])
    assert (optimizer.defaults["nesterov"], optimizer.defaults["momentum"]) == (True, 0.8)


class Recording(nn.Linear):
    """A student that remembers the dtype of the logits it gave."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        self.dtype_seen = logits.dtype
        return logits


@pytest.mark.parametrize(("autocast", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_forward_pass_has_the_precision_that_autocast_asks_for(make_sweep, loader, autocast, dtype):
    training = trained(LoopedStudents, make_sweep(autocast=autocast), lambda: Recording(6, 3), loader)
    assert training.students.modules[0].dtype_seen == dtype


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_weights_stay_in_float32_under_autocast(make_sweep, make_mlp, loader, kind):
    training = trained(kind, make_sweep(autocast="bfloat16", seeds=(0, 1)), make_mlp, loader)
    assert {tensor.dtype for tensor in training.students.state().values()} == {torch.float32}


@pytest.mark.parametrize("kind", [StackedStudents, LoopedStudents])
def test_students_come_out_nearly_the_same_under_autocast(make_sweep, make_mlp, loader, kind):
    exact = trained(kind, make_sweep(seeds=(0, 1)), make_mlp, loader).students.state()
    rough = trained(kind, make_sweep(seeds=(0, 1), autocast="bfloat16"), make_mlp, loader).students.state()
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)
