"""What a repair does, or would do, to each file."""

from __future__ import annotations

__all__ = ["Action", "RepairReport", "Verb"]

from dataclasses import dataclass
from typing import Literal

from kdcache.verify import Finding

Verb = Literal["drop", "write", "fit", "build", "built", "keep", "cannot"]
"""`drop`: a bad record or shard is taken away. `write`: a file is made anew from what stands, or from the transfer set.
`fit`: parameters are fitted again with the teacher. `build`: something is missing and
needs the teacher, or the transfer set. `built`: it was built.
`keep`: a second reading was right. `cannot`: nothing here mends it."""


@dataclass(frozen=True)
class Action:
    """One step of a repair.

    Parameters
    ----------
    verb : Verb
    key : str
        The file, relative to the cache's address.
    why : str
        What is wrong with it.
    then : str
        What is left to do by hand; empty where nothing is.
    """

    verb: Verb
    key: str
    why: str
    then: str = ""


@dataclass(frozen=True)
class RepairReport:
    """What `repair_cache` did, or would do.

    Parameters
    ----------
    address : str
    is_dry_run : bool
        Whether nothing was changed.
    actions : tuple of Action
        In the order in which they are done.
    is_complete : bool
        Whether the cache is finished now.
    num_missing_shards : int
        Shards without a record that are still to be built.
    command : str or None
        What is to be run next; None where nothing is.
    findings : tuple of Finding
        What a quick verification still finds; of a dry run, what was found.
    """

    address: str
    is_dry_run: bool
    actions: tuple[Action, ...]
    is_complete: bool
    num_missing_shards: int
    command: str | None
    findings: tuple[Finding, ...]

    @property
    def hopeless(self) -> tuple[Action, ...]:
        """What nothing here can mend, each with what to do."""
        return tuple(action for action in self.actions if action.verb == "cannot")
