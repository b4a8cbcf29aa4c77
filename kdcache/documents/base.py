"""What all documents share: frozen, checked when made, every problem reported at once with its path."""

from __future__ import annotations

__all__ = ["Digest", "Document", "ImportString", "Name", "Temperature", "differences"]

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcache.errors import DocumentError, Problem

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="A SHA-256 digest in lower-case hexadecimal.")]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$",
        max_length=100,
        description="Letters, digits, '_', '-' and single inner dots: safe as a folder's name.",
    ),
]
ImportString = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="A Python object as `package.module:attribute`.",
    ),
]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Divides the logits before the softmax.")]


class Document(BaseModel):
    """Base of every kdcache document: frozen, no unknown fields, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    title: ClassVar[str]
    """The document's name in messages and of its schema file."""

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> Self:
        """Read a document from JSON text.

        Parameters
        ----------
        text : str or bytes
            The JSON text.
        source : str
            Where the text came from, for messages.

        Raises
        ------
        DocumentError
            The text breaks the schema; all problems are listed, each with its path.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DocumentError(cls.title, source, _problems(error)) from error

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, source: str) -> Self:
        """Read a document from parsed JSON or TOML.

        Raises
        ------
        DocumentError
            The mapping breaks the schema, or holds something that JSON cannot (dates, NaN).
        """
        try:
            text = json.dumps(mapping, allow_nan=False)
        except (TypeError, ValueError) as error:
            problem = Problem("", "not_json", f"holds a value that JSON cannot: {error}")
            raise DocumentError(cls.title, source, (problem,)) from error
        return cls.from_json(text, source=source)

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """Make a document from Python values, with errors of kdcache's own kind.

        Raises
        ------
        DocumentError
            A field breaks the schema.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise DocumentError(cls.title, "the value given", _problems(error)) from error

    def to_mapping(self) -> dict[str, Any]:
        """Give the document as plain JSON types."""
        return self.model_dump(mode="json")

    def to_json(self) -> bytes:
        """Give the document as JSON with sorted keys: equal documents give equal bytes."""
        return (json.dumps(self.to_mapping(), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def digest(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Walk two JSON values and yield (path, ours, theirs) wherever they differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(left, right, f"{path}[{index}]")
    elif ours != theirs:
        yield path, ours, theirs


def _problems(error: ValidationError) -> tuple[Problem, ...]:
    return tuple(
        Problem(_path(item["loc"]), item["type"], item["msg"]) for item in error.errors(include_url=False)
    )


def _path(location: tuple[str | int, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else part)
    return path
