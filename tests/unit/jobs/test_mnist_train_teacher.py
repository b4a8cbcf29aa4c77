"""A teacher's training continues exactly where it stopped, and jitter moves images by whole pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.mnist.data import Split
from jobs.mnist.train_teacher import (
    Jitter,
    Settings,
    StateMismatchError,
    Training,
    count_errors,
    learning_rate,
    load_teacher,
)
from kdcache.errors import JobError

SETTINGS = Settings(num_epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def split() -> Split:
    """Return 64 images whose label is written into them."""
    torch.set_num_threads(1)
    labels = (np.arange(64) % 10).astype(np.uint8)
    images = np.zeros((64, 28, 28), np.uint8)
    images[np.arange(64), 4 + 2 * labels, 8:20] = 255
    return Split(images=images, labels=labels)


def weights(training: Training) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])


def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(split: Split, tmp_path: Path) -> None:
    uninterrupted = Training(SETTINGS, split)
    uninterrupted.run_epoch()
    uninterrupted.save(tmp_path / "state")
    uninterrupted.run_epoch()
    continued = Training(SETTINGS, split)
    continued.restore(tmp_path / "state")
    continued.run_epoch()
    assert torch.equal(weights(continued), weights(uninterrupted))


def test_the_state_knows_how_many_epochs_are_finished(split: Split, tmp_path: Path) -> None:
    training = Training(SETTINGS, split)
    training.num_finished = 1
    training.save(tmp_path / "state")
    continued = Training(SETTINGS, split)
    continued.restore(tmp_path / "state")
    assert continued.num_finished == 1


def test_the_state_of_other_settings_is_refused(split: Split, tmp_path: Path) -> None:
    Training(SETTINGS, split).save(tmp_path / "state")
    other = Training(Settings(num_epochs=3, batch_size=32), split)
    with pytest.raises(StateMismatchError, match=r"'num_epochs': 2.*'num_epochs': 3.*delete the file"):
        other.restore(tmp_path / "state")


def test_another_seed_gives_other_initial_weights(split: Split) -> None:
    first, second = (Training(Settings(seed=seed), split) for seed in (0, 1))
    assert not torch.equal(weights(first), weights(second))


def test_weight_vectors_stay_within_the_constraint(split: Split) -> None:
    training = Training(Settings(num_epochs=1, batch_size=32, max_norm=0.3), split)
    training.run_epoch()
    longest = max(
        float(w.detach().norm(dim=1).max()) for name, w in training.model.named_parameters() if "weight" in name
    )
    assert longest == pytest.approx(0.3, abs=1e-6)


def test_errors_are_counted_in_evaluation_mode(split: Split) -> None:
    model = Training(SETTINGS, split).model
    assert count_errors(model, split) == count_errors(model, split)


def test_a_model_that_always_says_three_errs_on_all_others(split: Split) -> None:
    model = Training(SETTINGS, split).model
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model.get_parameter("linear_2.bias")[3] = 1.0
    assert count_errors(model, split) == int((split.labels != 3).sum())


def test_jitter_reaches_each_of_the_25_shifts() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 14, 14] = 255
    jittered = Jitter(image, max_shift=2).read(np.zeros(2000, np.int64), np.random.default_rng(0))
    rows_and_columns = {(int(row), int(column)) for _, row, column in zip(*np.nonzero(jittered), strict=True)}
    assert rows_and_columns == {(row, column) for row in range(12, 17) for column in range(12, 17)}


def test_no_jitter_leaves_the_images_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    same = Jitter(images, max_shift=0).read(np.arange(3), np.random.default_rng(0))
    np.testing.assert_array_equal(same, images)


def test_what_is_shifted_in_is_background() -> None:
    ink = np.full((1, 28, 28), 255, np.uint8)
    jittered = Jitter(ink, max_shift=2).read(np.zeros(500, np.int64), np.random.default_rng(0))
    assert jittered.reshape(500, -1).min(axis=1).tolist().count(0) > 400


def test_the_learning_rate_ends_at_zero() -> None:
    assert learning_rate(SETTINGS, 2.0) == pytest.approx(0.0, abs=1e-12)


def test_the_learning_rate_rises_over_the_first_epoch() -> None:
    settings = Settings(num_epochs=100)
    assert learning_rate(settings, 0.0) < learning_rate(settings, 0.5) < learning_rate(settings, 1.0)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"num_epochs": 0}, {"learning_rate": 0.0}, {"max_norm": float("nan")}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="expected"):
        Settings(**wrong)


def test_a_teacher_that_is_not_there_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"run `python -m jobs.mnist.train_teacher`"):
        load_teacher(tmp_path / "teacher-0.safetensors")
