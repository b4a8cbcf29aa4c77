"""All contestants, by name."""

from __future__ import annotations

__all__ = ["CONTESTANTS", "contestant_named"]

from typing import Final

from benchmarks.streaming.contestant import Contestant
from benchmarks.streaming.controls import CONTROLS
from benchmarks.streaming.ours import OURS
from benchmarks.streaming.peers import PACKAGES

CONTESTANTS: Final[dict[str, Contestant]] = {one.name: one for one in (*OURS, *CONTROLS, *PACKAGES)}
"""In the order of the tables."""


def contestant_named(name: str) -> Contestant:
    """Give a contestant.

    Raises
    ------
    SystemExit
        There is none of this name.
    """
    if name not in CONTESTANTS:
        raise SystemExit(f"there is no contestant {name!r}; there are {', '.join(CONTESTANTS)}")
    return CONTESTANTS[name]
