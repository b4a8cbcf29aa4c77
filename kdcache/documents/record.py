"""Records and the completion document: what says that data is published."""

from __future__ import annotations

__all__ = ["CertificateDocument", "CompleteDocument", "CompletedTeacher", "Record"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Digest, Document, Name, Temperature

Index = Annotated[int, Field(ge=0, le=2**53)]
Nats = Annotated[float, Field(ge=0)]


class CertificateDocument(Document):
    """Fidelity measured on real rows while they were encoded; KL is KL(teacher || decoded), in nats.

    For codec `topk` with tail `samples`, KL is of the kept classes and of all others as one class.
    """

    title: ClassVar[str] = "certificate"

    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)]
    mean_kl: tuple[Nats, ...]
    """Mean over the measured rows, at each temperature."""
    max_kl: tuple[Nats, ...]
    """Largest over the measured rows, at each temperature."""
    num_measured_rows: Annotated[int, Field(ge=1)]
    """Rows whose KL was measured."""
    max_error_range: Nats | None = None
    """Largest spread over classes of (decoded - true logit) over ALL rows, in logits; bounds every row's KL. Absent for
    codecs that do not keep every logit: only what was measured is known of them."""

    @model_validator(mode="after")
    def _check(self) -> CertificateDocument:
        if not len(self.temperatures) == len(self.mean_kl) == len(self.max_kl):
            raise ValueError("temperatures, mean_kl and max_kl differ in length")
        return self


class Record(Document):
    """Says that one shard of one teacher is published, whole. Holds no time and no host: equal work, equal bytes."""

    title: ClassVar[str] = "record"

    format_version: Literal[1] = 1
    teacher: Name
    shard_index: Index
    num_rows: Annotated[int, Field(ge=1)]
    """Rows that are not padding."""
    num_bytes: Annotated[int, Field(ge=1)]
    """Size of the stored object."""
    sha256: Digest
    """Digest of the stored object."""
    min_logit: float
    """Smallest finite logit of the shard, as the teacher gave it; masked classes, -inf, aside."""
    max_logit: float
    """Largest logit of the shard."""
    certificate: CertificateDocument


class CompletedTeacher(Document):
    """One teacher's part of the completion document."""

    title: ClassVar[str] = "completed teacher"

    name: Name
    num_shards: Annotated[int, Field(ge=1)]
    num_bytes: Annotated[int, Field(ge=1)]
    """Bytes of all shards."""
    document_digest: Digest
    """Digest of the teacher document, which names the digests of the codec's parameters."""
    records_digest: Digest
    """SHA-256 over the lines of the records' own digests, in shard order."""
    data_digest: Digest
    """SHA-256 over the lines of the digests of parameters and of shards: equal for equal stored data."""
    certificate: CertificateDocument


class CompleteDocument(Document):
    """Written last. Without it a reader refuses the cache."""

    title: ClassVar[str] = "complete"

    format_version: Literal[1] = 1
    plan_index: Index
    plan_digest: Digest
    examples_sha256: Digest
    """Digest of examples.parquet."""
    index_digest: Digest
    """Digest over the files of the id index."""
    teachers: Annotated[tuple[CompletedTeacher, ...], Field(min_length=1)]
    """In the ensemble's order."""
    data_digest: Digest
    """SHA-256 over the lines of all teachers' data digests: equal for two caches whose stored data are equal."""
