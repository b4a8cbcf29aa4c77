"""Finalise: check that every record stands, sum up the certificates, consolidate the metadata, then say complete."""

from __future__ import annotations

__all__ = ["finalise"]

import hashlib
from collections.abc import Sequence

from kdcache.documents import (
    CertificateDocument,
    CompleteDocument,
    CompletedTeacher,
    PlanDocument,
    Record,
    TeacherDocument,
)
from kdcache.errors import IncompleteCacheError
from kdcache.store import CacheStore


def finalise(store: CacheStore, plan_index: int, plan: PlanDocument, names: Sequence[str]) -> CompleteDocument:
    """Publish complete.json for a plan all of whose tasks are done.

    Parameters
    ----------
    store : CacheStore
    plan_index : int
        The plan's number.
    plan : PlanDocument
    names : sequence of str
        The stored teachers, in the ensemble's order.

    Raises
    ------
    IncompleteCacheError
        A shard has no record.
    """
    teachers = tuple(_completed(store, plan, name) for name in names)
    complete = CompleteDocument.make(
        plan_index=plan_index,
        plan_digest=plan.digest(),
        examples_sha256=store.examples_sha256(),
        index_digest=store.index_digest(),
        teachers=teachers,
        data_digest=_digest([teacher.data_digest for teacher in teachers]),
    )
    store.consolidate()
    store.check_zarr(names, plan.cache)
    store.replace_complete(complete)
    return complete


def _completed(store: CacheStore, plan: PlanDocument, name: str) -> CompletedTeacher:
    records = store.records(name)
    missing = [shard for shard in range(plan.cache.num_shards) if shard not in records]
    document = store.teacher(name)
    if missing or document is None:
        raise IncompleteCacheError(
            f"cache {store.address}: teacher {name!r} lacks {len(missing)} of {plan.cache.num_shards} shards "
            f"({missing[:10]}); the cache stays as it was. Run the build with this teacher again"
        )
    ordered = [records[shard] for shard in range(plan.cache.num_shards)]
    return CompletedTeacher.make(
        name=name,
        num_shards=len(ordered),
        num_bytes=sum(record.num_bytes for record in ordered),
        document_digest=document.digest(),
        records_digest=_digest([record.digest() for record in ordered]),
        data_digest=_digest([*_parameter_digests(document), *(record.sha256 for record in ordered)]),
        certificate=_sum_up(ordered),
    )


def _parameter_digests(document: TeacherDocument) -> list[str]:
    return [parameter.sha256 for _, parameter in sorted(document.parameters.items())]


def _sum_up(records: Sequence[Record]) -> CertificateDocument:
    certificates = [record.certificate for record in records]
    count = sum(certificate.num_measured_rows for certificate in certificates)
    temperatures = certificates[0].temperatures
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
        max_error_range=max(certificate.max_error_range for certificate in certificates),
    )


def _digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
