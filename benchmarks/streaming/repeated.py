"""A large cache of a small one's rows: shards as a build writes them, without running the encoder on rows again."""

from __future__ import annotations

__all__ = ["repeated_cache", "repeats"]

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import kdcache
from kdcache.build.finalise import finalise
from kdcache.build.plan import make_plan
from kdcache.documents import CertificateDocument, PlanDocument, Record, TeacherDocument
from kdcache.store import CacheStore, ExampleTable


def repeats(num_source_rows: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Give the source row of every row, int64 [row]: all of them in one random order after another.

    No chunk holds a source row often, so that repetition helps no compressor.
    """
    generator = np.random.default_rng(0)
    passes = [generator.permutation(num_source_rows) for _ in range(-(-num_rows // num_source_rows))]
    return np.concatenate(passes)[:num_rows]


def repeated_cache(small: kdcache.SoftTargetCache, source_rows: npt.NDArray[np.int64], folder: Path) -> None:
    """Write a cache whose rows are those of another, one teacher's, in the order given.

    Its certificates are the small cache's, without bounds, which are of other numbers of rows.
    """
    (name,) = small.teacher_names
    codes = np.asarray(small.as_zarr()[f"teachers/{name}/codes"][: small.document.num_rows])  # type: ignore[index]
    source, store = CacheStore.at(small.address), CacheStore.at(folder)
    standing = source.plans()[-1]
    transfer_set = kdcache.TransferSet.from_arrays(torch.arange(len(source_rows)))
    plan = make_plan(transfer_set, standing.teachers, codec=standing.codec, num_classes=standing.cache.num_classes)
    teacher = _begin(store, plan, transfer_set, small.teachers[name], source)
    record = source.record(name, 0)
    if record is None:
        raise FileNotFoundError(f"{small.address} has no record of its first shard")
    for shard_index in range(plan.cache.num_shards):
        start = shard_index * plan.cache.shard_rows
        rows = codes[source_rows[start : start + plan.cache.shard_rows]]
        published = store.publish_shard(teacher, plan.cache, shard_index, rows)
        store.publish_record(
            Record.make(
                teacher=name,
                shard_index=shard_index,
                num_rows=len(rows),
                num_bytes=published.num_bytes,
                sha256=published.sha256,
                min_logit=record.min_logit,
                max_logit=record.max_logit,
                certificate=_without_bounds(record.certificate),
            )
        )
    finalise(store, 0, plan)


def _begin(
    store: CacheStore,
    plan: PlanDocument,
    transfer_set: kdcache.TransferSet,
    teacher: TeacherDocument,
    source: CacheStore,
) -> TeacherDocument:
    store.publish_plan(0, plan)
    store.write_root(plan.cache)
    table = ExampleTable(
        example_ids=transfer_set.example_ids,
        first_row=np.arange(len(transfer_set)),
        num_rows=transfer_set.num_rows,
        labels=transfer_set.labels,
        input_digests=transfer_set.input_digests,
    )
    store.write_examples(table)
    store.write_index(table)
    document = TeacherDocument.from_mapping({**teacher.to_mapping(), "chunk_rows": None}, source="the small cache")
    return store.publish_teacher(document, source.parameters(teacher))


def _without_bounds(certificate: CertificateDocument) -> CertificateDocument:
    return certificate.model_copy(update={"max_error_range": None, "bounds": ()})
