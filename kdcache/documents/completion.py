"""Completion: what complete.json says of a teacher follows from the teacher's document and its records alone."""

from __future__ import annotations

__all__ = ["completed_teacher", "digest_of_digests", "merged_bounds"]

import hashlib
from collections.abc import Iterable, Sequence

from kdcache.documents.histogram import Histogram
from kdcache.documents.record import BoundDocument, CertificateDocument, CompletedTeacher, Record
from kdcache.documents.teacher import TeacherDocument


def completed_teacher(document: TeacherDocument, records: Sequence[Record]) -> CompletedTeacher:
    """Sum up a teacher all of whose shards are published.

    Parameters
    ----------
    document : TeacherDocument
    records : sequence of Record [shard]
        Of all shards, in their order.
    """
    parameters = [parameter.sha256 for _, parameter in sorted(document.parameters.items())]
    return CompletedTeacher.make(
        name=document.name,
        num_shards=len(records),
        num_bytes=sum(record.num_bytes for record in records),
        document_digest=document.digest(),
        records_digest=digest_of_digests(record.digest() for record in records),
        data_digest=digest_of_digests([*parameters, *(record.sha256 for record in records)]),
        certificate=_sum_up([record.certificate for record in records]),
    )


def digest_of_digests(digests: Iterable[str]) -> str:
    """SHA-256 over hexadecimal digests, one a line, in hexadecimal."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _sum_up(certificates: Sequence[CertificateDocument]) -> CertificateDocument:
    first = certificates[0]
    measured = [certificate.num_measured_rows for certificate in certificates]
    ranges = [item.max_error_range for item in certificates if item.max_error_range is not None]
    is_bounded = len(ranges) == len(certificates)
    places = range(len(first.temperatures))
    return CertificateDocument.make(
        temperatures=first.temperatures,
        mean_kl=tuple(_mean([item.mean_kl[place] for item in certificates], measured) for place in places),
        max_kl=tuple(max(item.max_kl[place] for item in certificates) for place in places),
        kl_histograms=tuple(Histogram.merged([item.kl_histograms[place] for item in certificates]) for place in places),
        num_measured_rows=sum(measured),
        max_error_range=max(ranges) if is_bounded else None,
        bounds=merged_bounds(certificates) if is_bounded else (),
    )


def merged_bounds(certificates: Sequence[CertificateDocument]) -> tuple[BoundDocument, ...]:
    """Sum up the bounds of rows that are certified apart.

    Parameters
    ----------
    certificates : sequence of CertificateDocument
        With bounds for the same intervals.
    """
    rows = [certificate.num_bounded_rows for certificate in certificates]
    return tuple(
        BoundDocument.make(
            temperature=bounds[0].temperature,
            mean=_mean([bound.mean for bound in bounds], rows),
            max=max(bound.max for bound in bounds),
            histogram=Histogram.merged([bound.histogram for bound in bounds]),
        )
        for bounds in zip(*(certificate.bounds for certificate in certificates), strict=True)
    )


def _mean(means: Sequence[float], rows: Sequence[int]) -> float:
    return sum(mean * count for mean, count in zip(means, rows, strict=True)) / sum(rows)
