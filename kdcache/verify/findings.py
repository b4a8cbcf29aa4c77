"""What verifying finds: findings, which are damage, and notes, which are not."""

from __future__ import annotations

__all__ = ["Finding", "Kind", "Level", "Note", "VerifyReport", "kind_of_error"]

from dataclasses import dataclass
from typing import Literal

from kdcache.errors import DocumentError, KdcacheError

Level = Literal["quick", "digests", "deep"]
"""How much is read: documents and sizes; every byte; every byte, and every row decoded."""

Kind = Literal["missing", "torn", "altered", "contradicts", "extra", "hole", "not_finite", "differs_from_teacher"]
"""`missing`: a file is not there. `torn`: a file is cut short, or is no JSON. `altered`: a file's bytes are not those
that its digest, checksum or schema vouches for. `contradicts`: two things that are each whole do not agree. `extra`: a
file beyond what the cache has, which a reader of the format would count in. `hole`: a row was never written.
`not_finite`: a row decodes to NaN, to infinity, or to no class. `differs_from_teacher`: rows are further from the live
teacher than the certificate says."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a cache.

    Parameters
    ----------
    where : str
        The file or shard.
    what : str
        What is wrong, with expected and found.
    kind : Kind
        What sort of damage it is.
    key : str
        The file, relative to the cache's address.
    remedy : str
        The command that mends it, or begins to.
    teacher : str or None
    shard_index : int or None
        The shard, where it is one or its record.
    expected, found : str or None
        Both sides alone, where there are two.
    """

    where: str
    what: str
    kind: Kind
    key: str
    remedy: str
    teacher: str | None = None
    shard_index: int | None = None
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class Note:
    """A file that no cache has, and that nothing reads: no damage.

    Parameters
    ----------
    key : str
        The file, relative to the cache's address.
    what : str
        What is known of it.
    """

    key: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_cache` looked at and found.

    Parameters
    ----------
    address : str
    level : Level
        How much was read.
    is_complete : bool
        Whether the build has finished.
    num_shards : int
        Shards held against their records.
    num_bytes : int
        Their bytes, those of skipped shards among them.
    num_skipped : int
        Shards among them that an earlier run, which was stopped, had found sound.
    findings : tuple of Finding
        Empty for a sound cache.
    notes : tuple of Note
        Files that are no part of a cache.
    """

    address: str
    level: Level
    is_complete: bool
    num_shards: int
    num_bytes: int
    num_skipped: int
    findings: tuple[Finding, ...]
    notes: tuple[Note, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.findings


def kind_of_error(error: KdcacheError | OSError, *, is_there: bool) -> Kind:
    """Tell what sort of damage an error about a file stands for.

    Parameters
    ----------
    error : KdcacheError or OSError
        As reading the file raised it.
    is_there : bool
        Whether the file stands.
    """
    if not is_there:
        return "missing"
    if isinstance(error, DocumentError):
        return "torn" if any(problem.kind.startswith("json") for problem in error.problems) else "altered"
    return "torn" if isinstance(error.__cause__, ValueError) else "altered"
