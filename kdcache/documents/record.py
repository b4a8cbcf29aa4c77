"""Records and the completion document: what says that data is published."""

from __future__ import annotations

__all__ = [
    "BOUND_TEMPERATURES",
    "BoundDocument",
    "CertificateDocument",
    "CompleteDocument",
    "CompletedTeacher",
    "Record",
]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Digest, Document, Name, Temperature
from kdcache.documents.histogram import Histogram

Index = Annotated[int, Field(ge=0, le=2**53)]
Nats = Annotated[float, Field(ge=0)]


BOUND_TEMPERATURES: tuple[float, ...] = (1.0, 2.0, 4.0)
"""Where each interval of temperatures starts; it ends where the next starts, and the last has no end."""


class BoundDocument(Document):
    """Numbers s, one a row, for an interval of temperatures T: a row's KL at T is at most s / T^2."""

    title: ClassVar[str] = "bound"

    temperature: Temperature
    """Where the interval starts; it ends where the next starts, and the last has no end."""
    mean: Nats
    """Of s, over ALL rows."""
    max: Nats
    """Of s, over ALL rows."""
    histogram: Histogram
    """Of s, over ALL rows."""


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
    kl_histograms: tuple[Histogram, ...]
    """KL of the measured rows, at each temperature."""
    num_measured_rows: Annotated[int, Field(ge=1)]
    """Rows whose KL was measured."""
    max_error_range: Nats | None = None
    """Largest spread over classes of (decoded - true logit) over ALL rows, in logits; bounds every row's KL. Absent
    where what is decoded depends on the temperature."""
    bounds: tuple[BoundDocument, ...] = ()
    """Closer bounds from temperature 1 up, interval by interval; none where `max_error_range` is absent."""

    @model_validator(mode="after")
    def _check(self) -> CertificateDocument:
        if not len(self.temperatures) == len(self.mean_kl) == len(self.max_kl) == len(self.kl_histograms):
            raise ValueError("temperatures, mean_kl, max_kl and kl_histograms differ in length")
        if any(histogram.num_rows != self.num_measured_rows for histogram in self.kl_histograms):
            raise ValueError("a histogram of KL has other than num_measured_rows rows")
        if bool(self.bounds) != (self.max_error_range is not None):
            raise ValueError("bounds and max_error_range are given together, or neither of them")
        if self.bounds and tuple(bound.temperature for bound in self.bounds) != BOUND_TEMPERATURES:
            raise ValueError(f"the intervals of bounds do not start at {BOUND_TEMPERATURES}")
        if len({bound.histogram.num_rows for bound in self.bounds}) > 1:
            raise ValueError("the histograms of bounds differ in rows")
        return self

    @property
    def num_bounded_rows(self) -> int:
        """Rows that the bounds hold for; 0 where there are no bounds."""
        return self.bounds[0].histogram.num_rows if self.bounds else 0


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
    chunk_checksums: Annotated[str, Field(pattern=r"^([0-9a-f]{8})+$")] | None = None
    """The last four bytes of every chunk as stored, its CRC-32C, in hexadecimal, one chunk behind the other. They bind
    what is read of a shard to its place: another shard under its name is sound in itself. Absent in earlier records."""
    document_digest: Digest | None = None
    """Digest of the teacher's document under which the shard was encoded. Absent in earlier records."""

    @model_validator(mode="after")
    def _check(self) -> Record:
        if self.certificate.bounds and self.certificate.num_bounded_rows != self.num_rows:
            raise ValueError("the certificate's bounds are not of num_rows rows")
        return self


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
    fences_sha256: Digest | None = None
    """Digest of `index/fences/c/0/0`, which names the checksums of the index's other chunks. Absent in those of earlier
    releases."""
    teachers: Annotated[tuple[CompletedTeacher, ...], Field(min_length=1)]
    """In the ensemble's order."""
    data_digest: Digest
    """SHA-256 over the lines of all teachers' data digests: equal for two caches whose stored data are equal."""
