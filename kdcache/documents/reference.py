"""The reference page of the job file, made from the documents themselves so that it cannot drift."""

from __future__ import annotations

__all__ = ["job_reference"]

from typing import Any, get_args

from pydantic.fields import FieldInfo

from kdcache.documents.base import Document
from kdcache.documents.codec_specs import Codes, Lossless, Spectral, TopK
from kdcache.documents.job import (
    BuildOptions,
    CacheOptions,
    DaskCluster,
    DaskJobqueue,
    DaskLocal,
    Factory,
    InProcess,
    Job,
    Optimizer,
    StudentSweep,
    TeacherSource,
)

_SECTIONS: tuple[tuple[str, type[Document]], ...] = (
    ("The file", Job),
    ("`[cache]`", CacheOptions),
    ('`[cache] codec = { kind = "codes", ... }`', Codes),
    ('`[cache] codec = { kind = "lossless", ... }`', Lossless),
    ('`[cache] codec = { kind = "spectral", ... }`', Spectral),
    ('`[cache] codec = { kind = "topk", ... }`', TopK),
    ("`[transfer_set]`, `[evaluation]`, `subset = { ... }`", Factory),
    ("`[[teachers]]`", TeacherSource),
    ("`[build]`", BuildOptions),
    ('`[build] executor = { kind = "in-process" }`', InProcess),
    ('`[build] executor = { kind = "dask-local", ... }`', DaskLocal),
    ('`[build] executor = { kind = "dask", ... }`', DaskCluster),
    ('`[build] executor = { kind = "dask-jobqueue", ... }`', DaskJobqueue),
    ("`[[students]]`", StudentSweep),
    ("`optimizer = { ... }` of students", Optimizer),
)
_HEAD = """# The job file

A job is one TOML file. This page lists every option; it is made from the documents (`make schemas`), and
`schemas/job.schema.json` is the same as JSON Schema, for editors. Unknown options are errors.

Paths are relative to the job file. An import string, `package.module:attribute`, is looked for in the job file's
folder, then in the folder the command is run from, then among what is installed.
"""


def job_reference() -> str:
    """Give the reference page in Markdown."""
    return "\n".join([_HEAD, *(_section(title, document) for title, document in _SECTIONS)])


def _section(title: str, document: type[Document]) -> str:
    rows = [_row(name, field) for name, field in document.model_fields.items()]
    first = (document.__doc__ or "").strip().split("\n")[0]
    return "\n".join([f"## {title}\n", f"{first}\n", "| option | default | meaning |", "|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
    meaning = " ".join((field.description or "").split())
    choices = [str(value) for value in _choices(field.annotation)]
    if len(choices) > 1:
        meaning = f"{meaning} One of {', '.join(f'`{choice}`' for choice in choices)}.".strip()
    return f"| `{name}` | {default} | {meaning} |"


def _choices(annotation: Any) -> list[str]:
    """List the words of a Literal, also where it is optional."""
    arguments = get_args(annotation)
    if arguments and all(isinstance(value, str) for value in arguments):
        return list(arguments)
    return [choice for argument in arguments if get_args(argument) for choice in _choices(argument)]


def _default(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Document):
        return f"`{value.to_mapping().get('kind', 'as below')}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value!r}`".replace("'", '"')
