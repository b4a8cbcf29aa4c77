from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.teachers.recordings import Recipe, recorded_arrays

RECIPE = Recipe(
    teacher="small", what="main", version=1, packages={"PyPI one 1.0": "ab", "npm two 2.0": "cd"}, settings={"seed": 0}
)


def ones():
    return {"hidden": np.ones((4, 2), np.float32), "example_index": np.arange(4)}


def never():
    raise AssertionError("recorded again")


def test_the_order_of_a_recipe_does_not_change_its_digest():
    turned = replace(RECIPE, packages=dict(reversed(RECIPE.packages.items())))
    assert turned.digest() == RECIPE.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "large"},
        {"what": "other"},
        {"version": 2},
        {"packages": {"PyPI one 1.1": "ab", "npm two 2.0": "cd"}},
        {"packages": {"PyPI one 1.0": "ab", "npm two 2.0": "ce"}},
        {"settings": {"seed": 1}},
    ],
)
def test_any_change_of_a_recipe_changes_its_digest(change):
    assert replace(RECIPE, **change).digest() != RECIPE.digest()


def test_a_recording_is_read_back_as_it_was_made(tmp_path):
    np.testing.assert_equal(recorded_arrays(RECIPE, ones, root=tmp_path), ones())


def test_a_recording_is_made_once(tmp_path):
    recorded_arrays(RECIPE, ones, root=tmp_path)
    np.testing.assert_equal(recorded_arrays(RECIPE, never, root=tmp_path), ones())


def test_a_changed_recipe_makes_a_new_recording_and_keeps_the_old_one(tmp_path):
    recorded_arrays(RECIPE, ones, root=tmp_path)
    recorded_arrays(replace(RECIPE, version=2), ones, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_recording_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        recorded_arrays(RECIPE, never, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recording_says_what_it_was_made_from(tmp_path):
    recorded_arrays(RECIPE, ones, root=tmp_path)
    document = json.loads((tmp_path / RECIPE.folder_name / "recipe.json").read_text())
    assert document["recipe"]["packages"] == RECIPE.packages


def test_writing_to_what_was_read_changes_no_file(tmp_path):
    recorded_arrays(RECIPE, ones, root=tmp_path)["hidden"][:] = 7
    np.testing.assert_equal(recorded_arrays(RECIPE, never, root=tmp_path), ones())
