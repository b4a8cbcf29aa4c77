"""Failures: shards whose tasks raised an error. The others are finished first, unless nothing seems to succeed."""

from __future__ import annotations

__all__ = ["MAX_FAILURES_IN_A_ROW", "FailedShard", "Failures", "shard_names"]

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from kdcache.errors import (
    DocumentError,
    ExecutorError,
    KdcacheError,
    MissingExtraError,
    StoreError,
    WrongClassCountError,
)

MAX_FAILURES_IN_A_ROW = 8
"""Shards that fail with none succeeding between them after which a build stops: the fault lies with all of them."""

_OF_ALL_SHARDS = (DocumentError, ExecutorError, MissingExtraError, StoreError, WrongClassCountError)
"""Errors that the next shard would meet too."""

_OF_THE_STORE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

_SHOWN = 5


@dataclass(frozen=True)
class FailedShard:
    """A task that raised an error.

    Parameters
    ----------
    teacher : str
    shard_index : int
    error : Exception
    """

    teacher: str
    shard_index: int
    error: Exception


class Failures:
    """Counts failed shards, and says when a build should stop for them.

    Parameters
    ----------
    num_tasks : int
        Tasks that the build set out to run.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._failed: list[FailedShard] = []
        self._in_a_row = 0

    def note_success(self) -> None:
        """Note that a shard was built."""
        self._in_a_row = 0

    def add(self, failed: FailedShard) -> None:
        """Note that a shard failed.

        Raises
        ------
        Exception
            The shard's error where every other shard would meet it too, or the first one where
            `MAX_FAILURES_IN_A_ROW` shards have failed and none succeeded between them.
        """
        self._failed.append(failed)
        self._in_a_row += 1
        if _is_of_all_shards(failed.error):
            raise failed.error
        if self._in_a_row >= MAX_FAILURES_IN_A_ROW and len(self._failed) < self._num_tasks:
            raise self._first(
                f"The build stopped: {self._in_a_row} shards in a row failed ({self._names()}). Shards that are "
                "published are kept"
            )

    def raise_first(self) -> None:
        """Raise the first error, if there was one, with the number of shards that failed."""
        if self._failed:
            raise self._first(f"{self.in_words()}; the others are published")

    def in_words(self) -> str:
        """Say how many shards failed, and which."""
        return f"{len(self._failed)} of {self._num_tasks} shard(s) failed ({self._names()})"

    @property
    def first(self) -> Exception | None:
        """The first error, or None."""
        return self._failed[0].error if self._failed else None

    def _names(self) -> str:
        return shard_names((failed.teacher, failed.shard_index) for failed in self._failed)

    def _first(self, told: str) -> Exception:
        error = self._failed[0].error
        if isinstance(error, KdcacheError) and error.args and isinstance(error.args[0], str):
            error.args = (f"{error.args[0].rstrip('.')}. {told}", *error.args[1:])
        else:
            error.add_note(told)
        return error


def shard_names(tasks: Iterable[tuple[str, int]]) -> str:
    """Name the first few of some (teacher, shard) pairs."""
    names = [f"{teacher}/{shard}" for teacher, shard in sorted(tasks)]
    return ", ".join(names[:_SHOWN] + ["..."] * (len(names) > _SHOWN))


def _is_of_all_shards(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _OF_THE_STORE:
        return True
    return isinstance(error, _OF_ALL_SHARDS)
