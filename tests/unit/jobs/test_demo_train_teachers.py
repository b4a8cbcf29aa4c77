"""The demo's teachers: the same from the same seed, and kept once they stand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from jobs.demo.train_teachers import Recipe, shifted, train_teachers
from kdcache.jobs import read_job

JOB = """
name = "small"
teachers = [
  { name = "a", factory = "jobs.demo.models:network", arguments = { units = 8 }, checkpoint = "out/a.safetensors" },
  { name = "b", factory = "jobs.demo.models:network", arguments = { units = 8 }, checkpoint = "out/b.safetensors" },
]

[transfer_set]
factory = "jobs.demo.data:transfer_set"

[cache]
address = "out/cache"
"""
RECIPE = Recipe(num_epochs=1)


@pytest.fixture
def loaded(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return read_job(path)


def test_every_teacher_of_the_job_is_trained(loaded):
    assert train_teachers(loaded, RECIPE) == 2
    assert {path.name for path in (loaded.folder / "out").iterdir()} == {"a.safetensors", "b.safetensors"}


def test_teachers_differ_by_their_seed(loaded):
    train_teachers(loaded, RECIPE)
    first, second = (load_file(loaded.folder / f"out/{name}.safetensors") for name in "ab")
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_teachers_that_stand_are_kept(loaded):
    train_teachers(loaded, RECIPE)
    assert train_teachers(loaded, RECIPE) == 0


def test_a_missing_teacher_is_trained_to_what_it_was(loaded):
    train_teachers(loaded, RECIPE)
    path = loaded.folder / "out/b.safetensors"
    before = path.read_bytes()
    path.unlink()
    assert train_teachers(loaded, RECIPE) == 1
    assert path.read_bytes() == before


def test_a_teacher_of_another_recipe_is_trained_again(loaded):
    train_teachers(loaded, RECIPE)
    assert train_teachers(loaded, Recipe(num_epochs=1, max_shift=1)) == 2


def test_a_checkpoint_that_was_cut_short_is_trained_again(loaded):
    train_teachers(loaded, RECIPE)
    path = loaded.folder / "out/a.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert train_teachers(loaded, RECIPE) == 1


def test_progress_ends_with_all_teachers(loaded):
    steps = []
    train_teachers(loaded, RECIPE, progress=lambda _text, done, total: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_a_shift_moves_the_whole_image():
    image = torch.zeros(28, 28)
    image[10:12, 5] = torch.tensor([0.25, 1.0])
    moved = shifted(image.view(1, 784).repeat(200, 1), max_shift=2).view(200, 28, 28)
    assert torch.equal(moved.flatten(1).max(dim=1).values, torch.ones(200))
    assert torch.equal(moved.sum(dim=(1, 2)), torch.full((200,), 1.25))


def test_shifts_reach_every_place_within_their_range_and_none_beyond():
    image = torch.zeros(28, 28)
    image[10, 5] = 1.0
    moved = shifted(image.view(1, 784).repeat(1000, 1), max_shift=1).view(1000, 28, 28)
    places = {(row, column) for _, row, column in moved.nonzero().tolist()}
    assert places == {(row, column) for row in (9, 10, 11) for column in (4, 5, 6)}


def test_what_is_shifted_in_is_background():
    moved = shifted(torch.ones(200, 784), max_shift=2).view(200, 28, 28)
    assert moved.sum(dim=(1, 2)).min() == 26 * 26
