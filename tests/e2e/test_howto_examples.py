"""The how-to page's programs: each runs, trains a student, and is what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "howto"
PAGE = (FOLDER / "add-soft-targets.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = sorted((FOLDER / "examples").glob("*.py"))


def without_spaces(text: str) -> str:
    """Take out what a formatter may change: the page's lines begin further left than the programs'."""
    return "".join(text.split())


def accuracy_of(name: str) -> float:
    """Run a program for two epochs, and give the student's accuracy that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    ended = subprocess.run(
        [sys.executable, FOLDER / "examples" / name, "--epochs", "2"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return float(re.search(r"student's accuracy after 2 epochs: ([0-9.]+)", ended.stdout)[1])


@pytest.mark.parametrize(
    "name",
    [
        "plain_torch.py",
        "join.py",
        pytest.param("trainer.py", marks=pytest.mark.slow),  # importing transformers takes longer than all the rest
        pytest.param("lightning_module.py", marks=pytest.mark.slow),  # as does lightning
    ],
)
def test_a_program_trains_a_student(name):
    assert accuracy_of(name) > 0.4


def test_the_page_shows_code():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("block", BLOCKS)
def test_what_the_page_shows_stands_in_a_program(block):
    assert any(without_spaces(block) in without_spaces(example.read_text()) for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_every_program_is_linked_from_the_page(example):
    assert f"(examples/{example.name})" in PAGE
