"""What all documents share: frozen, checked when made, every problem reported at once with its path."""

from __future__ import annotations

__all__ = ["GIVEN", "Digest", "Document", "ImportString", "Name", "Temperature", "differences"]

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcache.documents.json_text import json_text
from kdcache.documents.problems import WORDS, joined, problems_of
from kdcache.errors import DocumentError, Problem

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$"
_IMPORT_STRING = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
WORDS[_NAME] = "a name has letters, digits, '_', '-' and single inner dots, and starts with a letter or digit"
WORDS[_IMPORT_STRING] = "an import string names a Python object as package.module:attribute"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="A SHA-256 digest in lower-case hexadecimal.")]
Name = Annotated[
    str,
    Field(
        pattern=_NAME,
        max_length=100,
        description="Letters, digits, '_', '-' and single inner dots: safe as a folder's name.",
    ),
]
ImportString = Annotated[
    str,
    Field(
        pattern=_IMPORT_STRING,
        description="A Python object as `package.module:attribute`.",
    ),
]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Divides the logits before the softmax.")]

GIVEN = "the value given"
"""Source of a document that is made of Python values: what breaks it is a caller's input, not a stored file."""


class _DocumentType(ModelMetaclass):
    """Makes documents from Python values with errors of kdcache's own kind; within others pydantic reports its own."""

    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **fields: Any) -> Any:  # noqa: N805 - of a metaclass
            if args:
                told = f"got {', '.join(map(repr, args))} without a name; options are given by name"
                raise DocumentError(cls.title, GIVEN, (Problem("", "positional", told),), cls.remedy)
            try:
                return super().__call__(**fields)
            except ValidationError as error:
                raise DocumentError(cls.title, GIVEN, problems_of(error, fields, cls), cls.remedy) from error


class Document(BaseModel, metaclass=_DocumentType):
    """Base of every kdcache document: frozen, no unknown fields, no silent conversion.

    Raises
    ------
    DocumentError
        A field breaks the schema.
    """

    model_config = ConfigDict(
        defer_build=True, frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    title: ClassVar[str]
    """The document's name in messages and of its schema file."""
    remedy: ClassVar[str | None] = None
    """How it is rightly written in Python, for messages."""

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
            raise DocumentError(cls.title, source, problems_of(error, _parsed(text), cls)) from error

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, source: str) -> Self:
        """Read a document from parsed JSON or TOML.

        Raises
        ------
        DocumentError
            The mapping breaks the schema, or holds something that JSON cannot (dates, NaN).
        """
        problems = tuple(_not_json(mapping))
        if problems:
            raise DocumentError(cls.title, source, problems)
        return cls.from_json(json.dumps(mapping, allow_nan=False), source=source)

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """Make a document from Python values, with errors of kdcache's own kind.

        Raises
        ------
        DocumentError
            A field breaks the schema.
        """
        return cls(**fields)

    def to_mapping(self) -> dict[str, Any]:
        """Give the document as plain JSON types; absent options are left out, so that later ones change no digest."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> bytes:
        """Give the document as JSON with sorted keys: equal documents give equal bytes."""
        return (json_text(self.to_mapping()) + "\n").encode()

    def digest(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Walk two JSON values and yield (path, ours, theirs) wherever they differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from differences(ours.get(key), theirs.get(key), joined(path, key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(left, right, joined(path, index))
    elif ours != theirs:
        yield path, ours, theirs


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError):
        return None


def _not_json(value: Any, path: str = "") -> Iterator[Problem]:
    """Find what JSON has no form for: TOML's dates and infinities, and whatever Python object was given."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_json(item, joined(path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_json(item, joined(path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, "not_json", f"{value} is no number that JSON can hold")
    elif value is not None and not isinstance(value, str | int | float):
        yield Problem(path, "not_json", f"JSON has no {type(value).__name__}; write it as text")
