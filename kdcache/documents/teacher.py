"""The teacher document: where a stored array's logits come from and how they are coded."""

from __future__ import annotations

__all__ = ["Fingerprint", "Parameter", "TeacherDocument"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Digest, Document, Name
from kdcache.documents.codec_specs import CodecSpec


class Fingerprint(Document):
    """What makes a teacher this teacher: compared before any work is done on its behalf."""

    title: ClassVar[str] = "fingerprint"

    name: Name
    source: Annotated[str, Field(max_length=500)]
    """The class or import string the network was made from: provenance, never imported when reading."""
    weights_sha256: Digest
    """Digest over the names, dtypes, shapes and bytes of all weights, or of a caller's own fingerprint."""
    settings_sha256: Digest | None = None
    """Digest over what the weights do not tell: the factory's arguments and the network's own description. Absent where
    a caller's own fingerprint tells all."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """The reduced precision the network ran in."""


class Parameter(Document):
    """A small array a codec needs, stored beside the codes."""

    title: ClassVar[str] = "parameter"

    dtype: Literal["float32", "float16", "float64", "int64", "uint8", "uint16"]
    shape: tuple[Annotated[int, Field(ge=0, le=2**40)], ...]
    sha256: Digest
    """Digest of the little-endian bytes in C order."""


class TeacherDocument(Document):
    """Stored as attribute `kdcache` of a teacher's group; never changes once written."""

    title: ClassVar[str] = "teacher"

    name: Name
    members: Annotated[tuple[Fingerprint, ...], Field(min_length=1)]
    """The networks behind the stored logits: one, or all members of a merged cache."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weights of the members in a merged cache, summing to 1; equal where absent."""
    num_classes: Annotated[int, Field(ge=1)]
    codec: CodecSpec
    """The codec as it was fitted: nothing in it is left open."""
    num_columns: Annotated[int, Field(ge=1)]
    """Stored columns a row."""
    chunk_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows that are read and checked together, a divisor of the cache's shard_rows; as the cache document says where
    absent. Given where a codec that was chosen from a pilot has other rows than the plan reckoned with."""
    storage_dtype: Literal["uint8", "uint16", "float16", "float32"]
    parameters: dict[Name, Parameter]
    parameters_group: Name | None = None
    """Group beside the codes that holds the parameters; named after their content, so that two fits never mix."""
    num_pilot_rows: Annotated[int, Field(ge=0)]
    """Rows on which the codec was fitted."""

    @model_validator(mode="after")
    def _check(self) -> TeacherDocument:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.weights)} weights for {len(self.members)} members")
        if bool(self.parameters) != (self.parameters_group is not None):
            raise ValueError("parameters_group must be given exactly where there are parameters")
        return self
