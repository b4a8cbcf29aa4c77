"""Problems of a document, in words: where each stands, what was found there, and what could stand there."""

from __future__ import annotations

__all__ = ["WORDS", "joined", "problems_of"]

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kdcache.errors import Problem

WORDS: dict[str, str] = {}
"""What a pattern means, by the pattern."""

_LONGEST_INPUT = 80


def problems_of(error: ValidationError, value: Any, document: type[BaseModel]) -> tuple[Problem, ...]:
    """List what is wrong with a value that was to be a document.

    Parameters
    ----------
    error : ValidationError
        Of pydantic.
    value : Any
        What was given, as a mapping where it could be read.
    document : type
        What it was to be.
    """
    found = [
        Problem(_path(item["loc"], value), item["type"], _message(item, document))
        for item in error.errors(include_url=False)
    ]
    return tuple(problem for problem in found if not _follows_from_others(problem, found))


def joined(path: str, part: str | int) -> str:
    """Lengthen a path by one part."""
    return f"{path}[{part}]" if isinstance(part, int) else f"{path}.{part}" if path else part


def _follows_from_others(problem: Problem, found: list[Problem]) -> bool:
    """Pydantic calls a sequence too short once none of its items is valid; the items' own problems say it all."""
    return problem.kind == "too_short" and any(other.path.startswith(f"{problem.path}[") for other in found)


def _path(location: tuple[str | int, ...], value: Any) -> str:
    path = ""
    for part in location:
        if isinstance(value, Mapping) and part not in value and value.get("kind") == part:
            continue  # pydantic puts the member of a union that was meant between the field and the member's fields
        path = joined(path, part)
        try:
            value = value[part]
        except (LookupError, TypeError):
            value = None
    return path


def _message(item: Any, document: type[BaseModel]) -> str:
    """Say what is wrong, what was found, and what can stand there."""
    told = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return _no_such_option(item["loc"], document) or told
    if item["type"] == "string_pattern_mismatch":
        told = WORDS.get(item["ctx"]["pattern"], told)
    given = item["input"]
    is_plain = given is None or isinstance(given, str | int | float)
    if item["type"] in {"missing", "value_error", "json_invalid"} or not is_plain:
        return told
    text = repr(given)
    return f"{told}, got {text if len(text) <= _LONGEST_INPUT else text[: _LONGEST_INPUT - 3] + '...'}"


def _no_such_option(location: tuple[str | int, ...], document: type[BaseModel]) -> str | None:
    """List the options that there are, the one that was probably meant first."""
    owner = _owner(location[:-1], document)
    if owner is None:
        return None
    near = difflib.get_close_matches(str(location[-1]), owner.model_fields, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no such option{meant}; there are {', '.join(owner.model_fields)}"


def _owner(location: tuple[str | int, ...], document: type[BaseModel]) -> type[BaseModel] | None:
    """Find the document that a location lies in; None where a union leaves it open."""
    kinds = {document}
    for part in location:
        within = {kind for owner in kinds if part in owner.model_fields for kind in _kinds_of(owner, str(part))}
        tagged = {kind for kind in kinds if "kind" in kind.model_fields and kind.model_fields["kind"].default == part}
        kinds = within or tagged or kinds
    return next(iter(kinds)) if len(kinds) == 1 else None


def _kinds_of(owner: type[BaseModel], name: str) -> Iterator[type[BaseModel]]:
    return _documents_in(owner.model_fields[name].annotation)


def _documents_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _documents_in(argument)
