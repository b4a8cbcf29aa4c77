"""Every error that kdcache raises, in one tree.

Each message says what failed and where, what was expected and what was found, the state that is left,
and the call or command that mends it. Every leaf also inherits the builtin it is a kind of, so that
``except ValueError`` or ``except KeyError`` in a caller's code keeps its meaning.
"""

from __future__ import annotations

__all__ = [
    "CacheExistsError",
    "CacheNotFoundError",
    "CodecError",
    "CorruptCacheError",
    "DocumentError",
    "DuplicateExampleError",
    "ExecutorError",
    "IncompleteCacheError",
    "InputMismatchError",
    "JobError",
    "KdcacheError",
    "MergedCacheError",
    "MissingExtraError",
    "NoStateError",
    "NonFiniteLogitsError",
    "OptionError",
    "PlanMismatchError",
    "Problem",
    "ShapeError",
    "StoreError",
    "TeacherError",
    "TemperatureError",
    "TransferSetError",
    "UnknownExampleError",
    "UnknownTeacherError",
    "WorkerError",
    "WrongClassCountError",
]

from dataclasses import dataclass


class KdcacheError(Exception):
    """Base of every error raised on purpose by kdcache."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a document.

    Parameters
    ----------
    path : str
        Where it stands, as a path from the document's root, such as ``teachers[1].name``.
    kind : str
        A short machine-readable word, such as ``missing`` or ``extra_forbidden``.
    message : str
        What is wrong, for a person.
    """

    path: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.path or '(root)'}: {self.message} [{self.kind}]"


class DocumentError(KdcacheError, ValueError):
    """A document breaks its schema or a rule between its fields; ``problems`` lists all of it at once."""

    def __init__(self, document: str, source: str, problems: tuple[Problem, ...], remedy: str | None = None) -> None:
        self.document = document
        self.source = source
        self.problems = problems
        self.remedy = remedy
        lines = "".join(f"\n  {problem}" for problem in problems)
        then = "" if remedy is None else f"\n{remedy}"
        super().__init__(f"{source} is no valid {document} document; {len(problems)} problem(s):{lines}{then}")

    def __reduce__(self) -> tuple[type[DocumentError], tuple[str, str, tuple[Problem, ...], str | None]]:
        return type(self), (self.document, self.source, self.problems, self.remedy)


class JobError(KdcacheError, ValueError):
    """A job file cannot be carried out: an import string, an argument or a checkpoint is wrong."""


class OptionError(KdcacheError, ValueError):
    """An option has a value that is not among those it can take."""


class MissingExtraError(KdcacheError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class NoStateError(KdcacheError, AttributeError):
    """A loader has no state to save or to go on from."""


class TemperatureError(KdcacheError, ValueError):
    """A temperature is not a finite number above zero."""


class ShapeError(KdcacheError, ValueError):
    """Two arrays that belong together differ in rows, classes or axes."""


class CodecError(KdcacheError, ValueError):
    """A codec cannot hold the logits given, or its parameters do not fit it."""


class TransferSetError(KdcacheError, ValueError):
    """A transfer set is malformed: ids, labels or inputs cannot be used."""


class DuplicateExampleError(TransferSetError):
    """Two examples of a transfer set have the same example_id."""


class NonFiniteLogitsError(KdcacheError, ArithmeticError):
    """Logits hold NaN or +inf, or nothing but -inf in a row."""


class WrongClassCountError(KdcacheError, ValueError):
    """A teacher's logits have another number of classes than the cache."""


class TeacherError(KdcacheError, RuntimeError):
    """A teacher failed while it ran; its own error is the cause."""


class PlanMismatchError(KdcacheError, ValueError):
    """The address holds a cache built from another plan."""


class ExecutorError(KdcacheError, RuntimeError):
    """Tasks could not be carried out by the executor; finished shards are kept."""


class StoreError(KdcacheError, OSError):
    """The place an address names cannot keep a cache: an unknown scheme, no answer, no safe way to publish."""


class CacheNotFoundError(KdcacheError, FileNotFoundError):
    """No cache stands at the address."""


class CacheExistsError(KdcacheError, FileExistsError):
    """Something stands at the address that must not be overwritten."""


class IncompleteCacheError(KdcacheError, RuntimeError):
    """The cache's build has not finished, and incomplete reading was not asked for."""


class CorruptCacheError(KdcacheError, OSError):
    """A stored file is missing, torn or altered."""


class UnknownExampleError(KdcacheError, KeyError):
    """An example_id is not in the cache."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnknownTeacherError(KdcacheError, KeyError):
    """A teacher's name is not in the cache."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InputMismatchError(KdcacheError, ValueError):
    """The inputs given at training are not the inputs the teachers saw."""


class MergedCacheError(KdcacheError, ValueError):
    """A cache that keeps only the members' mean was asked for something that needs the members."""


class WorkerError(KdcacheError, RuntimeError):
    """A worker process that read inputs died."""
