"""Completion: what complete.json says of a teacher follows from the teacher's document and its records alone."""

from __future__ import annotations

__all__ = ["completed_teacher", "digest_of_digests"]

import hashlib
from collections.abc import Iterable, Sequence

from kdcache.documents.record import CertificateDocument, CompletedTeacher, Record
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
    count = sum(certificate.num_measured_rows for certificate in certificates)
    temperatures = certificates[0].temperatures
    ranges = [item.max_error_range for item in certificates if item.max_error_range is not None]
    return CertificateDocument.make(
        temperatures=temperatures,
        mean_kl=tuple(
            sum(certificate.mean_kl[index] * certificate.num_measured_rows for certificate in certificates) / count
            for index in range(len(temperatures))
        ),
        max_kl=tuple(
            max(certificate.max_kl[index] for certificate in certificates) for index in range(len(temperatures))
        ),
        num_measured_rows=count,
        max_error_range=max(ranges) if len(ranges) == len(certificates) else None,
    )
