"""Builds, additions of a teacher and repairs survive SIGKILL at any moment; see `kill_moments.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_moments import NUM_SHARDS

PROGRAM = Path(__file__).with_name("kill_moments.py")
IN_FLIGHT = 12
"""Batches at most that are run and lost: the pilot's, and of shards that wait to be encoded."""


def run(folder, num_kills, seed=0):
    """Give the undisturbed ends by what was run, and the lines of all kills."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(num_kills), str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True, timeout=3000,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    undisturbed = {line["work"]: line["undisturbed"] for line in lines if "undisturbed" in line}
    return undisturbed, [line for line in lines if "seconds" in line]


@pytest.fixture(scope="module", params=[6, pytest.param(120, marks=pytest.mark.slow)])
def kills(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp("kills"), request.param)


def test_runs_are_killed_while_they_are_at_it(kills):
    _, lines = kills
    assert sum(line["was_killed"] for line in lines) > 0.5 * len(lines)


def test_the_same_call_ends_each_with_the_data_of_an_undisturbed_one(kills):
    undisturbed, lines = kills
    assert [line["end"] for line in lines] == [undisturbed[line["work"]] for line in lines]
    assert {line["again"] for line in lines} == {"null"}


def test_what_a_killed_run_leaves_is_refused_or_right(kills):
    _, lines = kills
    assert [line["left"] for line in lines if not isinstance(line["left"], dict)] == []
    assert all(line["left"]["is_right"] for line in lines if line["left"]["opens"])


def test_an_addition_that_is_killed_leaves_the_ensemble_that_was(kills):
    _, lines = kills
    added = [line["left"] for line in lines if line["work"] == "add"]
    assert {left["opens"] for left in added} == {True}
    assert {left["teachers"] for left in added} <= {2, 3}


def test_no_partial_file_is_left_in_the_end(kills):
    _, lines = kills
    assert {line["partials"] for line in lines} == {0}


def test_work_is_lost_of_what_was_in_hand_alone(kills):
    _, lines = kills
    needed = {"build": 2 * NUM_SHARDS, "add": NUM_SHARDS, "repair": NUM_SHARDS // 4 + 1}
    lost = [line["num_calls"] - needed[line["work"]] for line in lines]
    assert max(lost) <= IN_FLIGHT
