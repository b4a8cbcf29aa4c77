"""The exception tree: every error is kdcache's own and the builtin it is a kind of, and travels between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from kdcache import errors
from kdcache.errors import DocumentError, KdcacheError, Problem, UnknownExampleError, UnknownTeacherError

BUILTINS = {
    "CacheExistsError": FileExistsError,
    "CacheNotFoundError": FileNotFoundError,
    "CodecError": ValueError,
    "CorruptCacheError": OSError,
    "DocumentError": ValueError,
    "DuplicateExampleError": ValueError,
    "ExecutorError": RuntimeError,
    "IncompleteCacheError": RuntimeError,
    "InputMismatchError": ValueError,
    "JobError": ValueError,
    "MergedCacheError": ValueError,
    "MissingExtraError": ImportError,
    "NoStateError": AttributeError,
    "NonFiniteLogitsError": ArithmeticError,
    "OptionError": ValueError,
    "PlanMismatchError": ValueError,
    "ShapeError": ValueError,
    "StoreError": OSError,
    "TeacherError": RuntimeError,
    "TemperatureError": ValueError,
    "TransferSetError": ValueError,
    "UnknownExampleError": KeyError,
    "UnknownTeacherError": KeyError,
    "WorkerError": RuntimeError,
    "WrongClassCountError": ValueError,
}
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]
LEAVES = [value for value in CLASSES if value is not KdcacheError]
DOCUMENT_ERROR = DocumentError("plan", "plans/0.json", (Problem("codec", "missing", "Field required"),), "Give one")


def made(kind):
    return DOCUMENT_ERROR if kind is DocumentError else kind("shard 3 of teacher 'a' is gone; run the build again")


def test_every_error_is_named_below():
    assert {kind.__name__ for kind in LEAVES} == set(BUILTINS)


def test_every_error_is_offered():
    assert {kind.__name__ for kind in CLASSES} | {"Problem"} == set(errors.__all__)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_is_kdcaches_own(kind):
    assert issubclass(kind, KdcacheError)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_is_the_builtin_it_is_a_kind_of(kind):
    assert issubclass(kind, BUILTINS[kind.__name__])


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_is_documented(kind):
    assert kind.__doc__.endswith(".")


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_says_its_message_as_it_is(kind):
    assert "shard 3 of teacher 'a' is gone" in str(made(kind)) or kind is DocumentError


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_travels_between_processes(kind):
    error = made(kind)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(again), str(again), again.args) == (type(error), str(error), error.args)


def test_a_document_error_travels_with_its_problems():
    again = pickle.loads(pickle.dumps(DOCUMENT_ERROR))  # noqa: S301
    assert (again.document, again.source, again.problems) == ("plan", "plans/0.json", DOCUMENT_ERROR.problems)
    assert str(again).endswith("\nGive one")


@pytest.mark.parametrize("kind", [UnknownExampleError, UnknownTeacherError])
def test_key_errors_are_not_quoted(kind):
    assert str(kind("no teacher 'z'")) == "no teacher 'z'"


@pytest.mark.parametrize("kind", [UnknownExampleError, UnknownTeacherError])
def test_key_errors_without_a_message_are_empty(kind):
    assert str(kind()) == ""
