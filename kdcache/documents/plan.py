"""The plan document: everything that decides which bytes a build writes."""

from __future__ import annotations

__all__ = ["MERGED_NAME", "PlanDocument"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Digest, Document
from kdcache.documents.cache import CacheDocument
from kdcache.documents.codec_specs import PlannedCodec
from kdcache.documents.teacher import Fingerprint

MERGED_NAME = "geometric-mean"
"""The name under which a merged cache stores its one array."""


class PlanDocument(Document):
    """Written once, create-only, as plans/INDEX.json; a later plan only appends teachers."""

    title: ClassVar[str] = "plan"

    format_version: Literal[1] = 1
    cache: CacheDocument
    teachers: Annotated[tuple[Fingerprint, ...], Field(min_length=1)]
    """The ensemble, in order."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weights of a merged mean, summing to 1."""
    codec: PlannedCodec
    """How logits are stored, or what that has to reach; each teacher's document names the codec that it got."""
    batch_size: Annotated[int, Field(ge=1)]
    """Examples a teacher sees at once. Batches lie on a grid over the transfer set, so a row's logits never depend on
    which shards were still missing."""
    num_pilot_rows: Annotated[int, Field(ge=1)]
    keeps_chunk_rows: Literal[True] | None = None
    """With a rate target: chunk_rows was asked for, so all teachers have it. Where absent, each teacher has what suits
    the codec it got."""
    previous: Digest | None = None
    """Digest of the plan before this one, where teachers were added."""

    @model_validator(mode="after")
    def _check(self) -> PlanDocument:
        names = [teacher.name for teacher in self.teachers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"teacher names stand more than once: {', '.join(repeated)}")
        if self.weights is not None and self.cache.merge is None:
            raise ValueError("weights are stored only in a merged cache; give them when reading instead")
        if self.weights is not None and len(self.weights) != len(self.teachers):
            raise ValueError(f"{len(self.weights)} weights for {len(self.teachers)} teachers")
        return self

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The names under which arrays are stored, in order: the teachers', or the one of a merged cache."""
        return (MERGED_NAME,) if self.cache.merge else tuple(teacher.name for teacher in self.teachers)
