"""Verifying: hold every stored file against the digest that vouches for it. Changes nothing."""

from __future__ import annotations

__all__ = ["Finding", "VerifyReport", "verify_cache"]

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kdcache.documents import (
    CacheDocument,
    CompleteDocument,
    CompletedTeacher,
    Document,
    PlanDocument,
    Record,
    TeacherDocument,
    completed_teacher,
    differences,
    digest_of_digests,
)
from kdcache.errors import KdcacheError, StoreError
from kdcache.store import CacheStore, layout

Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a cache.

    Parameters
    ----------
    where : str
        The file or shard.
    what : str
        Expected and found.
    teacher : str or None
    shard_index : int or None
        The shard to build again, where it is a shard.
    """

    where: str
    what: str
    teacher: str | None = None
    shard_index: int | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_cache` looked at and found.

    Parameters
    ----------
    address : str
    is_complete : bool
        Whether the build has finished.
    num_shards : int
        Shards held against their records.
    num_bytes : int
        Their bytes.
    findings : tuple of Finding
        Empty for a sound cache.
    """

    address: str
    is_complete: bool
    num_shards: int
    num_bytes: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.findings


def verify_cache(
    address: str | os.PathLike[str], *, on_progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Hold all records, shards, parameters, examples and the index of a cache against their digests.

    Parameters
    ----------
    address : str or path
    on_progress : callable (done shards, all shards), optional

    Returns
    -------
    VerifyReport
        Every finding, not the first alone.

    Raises
    ------
    CacheNotFoundError
        No cache stands there.
    DocumentError
        The root's cache document cannot be read, so nothing can be said of the rest.
    StoreError
        The place where the cache is kept does not answer, or refuses.
    """
    store = CacheStore.at(address)
    standing = _Standing.read(store)
    findings = [
        *standing.findings,
        *_plans(store, standing),
        *_teachers(store, standing),
        *_whole(store, standing.complete),
    ]
    num_shards, num_bytes = 0, 0
    total = standing.cache.num_shards * len(standing.names)
    for name in standing.names:
        for shard in range(standing.cache.num_shards):
            size, found = _shard(store, standing, name, shard)
            findings += found
            num_shards, num_bytes = num_shards + 1, num_bytes + size
            if on_progress is not None:
                on_progress(num_shards, total)
    return VerifyReport(store.address, standing.complete is not None, num_shards, num_bytes, tuple(findings))


@dataclass(frozen=True)
class _Standing:
    """The documents of a cache that could be read, and findings for those that could not."""

    cache: CacheDocument
    plans: tuple[PlanDocument, ...]
    complete: CompleteDocument | None
    teachers: Mapping[str, TeacherDocument]
    names: tuple[str, ...]
    findings: tuple[Finding, ...]

    @classmethod
    def read(cls, store: CacheStore) -> _Standing:
        findings: list[Finding] = []
        cache = store.cache_document()
        plans = _attempt(findings, "plans", store.plans) or []
        complete = _attempt(findings, "complete.json", store.complete)
        names = tuple(teacher.name for teacher in complete.teachers) if complete else ()
        names = names or (plans[-1].stored_names if plans else ())
        found = {name: _attempt(findings, f"teacher {name!r}", partial(store.teacher, name)) for name in names}
        teachers = {name: document for name, document in found.items() if document is not None}
        return cls(cache, tuple(plans), complete, teachers, names, tuple(findings))


def _attempt(findings: list[Finding], where: str, read: Callable[[], Value]) -> Value | None:
    try:
        return read()
    except StoreError:  # the store could not be asked, which says nothing of the cache
        raise
    except (KdcacheError, OSError) as error:
        findings.append(Finding(where, str(error)))
        return None


def _shard(store: CacheStore, standing: _Standing, name: str, shard: int) -> tuple[int, list[Finding]]:
    where = f"teacher {name!r}, shard {shard}"
    try:
        record = store.record(name, shard)
        if record is None:
            missing = Finding(where, "there is no record", name, shard)
            return 0, [] if standing.complete is None else [missing]
        data = store.shard_bytes(name, shard)
    except StoreError:
        raise
    except KdcacheError as error:
        return 0, [Finding(where, str(error), name, shard)]
    altered = _as_written(store, layout.record_key(name, shard), record)
    wrong = [*altered, *_disagreements(standing.cache, record, data)]
    return len(data), [Finding(where, what, name, shard) for what in wrong]


def _as_written(store: CacheStore, key: str, document: Document) -> Iterator[str]:
    """Hold a document's file against the one way to write it: a bit may flip and leave the meaning as it was."""
    if store.objects.read(key) != document.to_json():
        yield f"the bytes of {key} are not as kdcache writes them: it was altered"


def _disagreements(cache: CacheDocument, record: Record, data: bytes) -> Iterator[str]:
    expected_rows = cache.rows_in_shard(record.shard_index)
    if record.num_rows != expected_rows:
        yield f"its record says {record.num_rows} rows, the layout {expected_rows}"
    if len(data) != record.num_bytes:
        yield f"it has {len(data)} bytes, its record says {record.num_bytes}"
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        yield f"it has digest {digest}, its record says {record.sha256}"


def _plans(store: CacheStore, standing: _Standing) -> Iterator[Finding]:
    """Hold each plan against the one before it, and the root's cache document against them all."""
    for index, plan in enumerate(standing.plans):
        key = layout.plan_key(index)
        yield from (Finding(key, what) for what in _as_written(store, key, plan))
        before = standing.plans[index - 1].digest() if index else None
        if plan.previous != before:
            yield Finding(key, f"names {plan.previous} as the plan before it, which is {before}")
        for path, ours, theirs in differences(standing.cache.to_mapping(), plan.cache.to_mapping()):
            yield Finding("zarr.json", f"says {path} is {ours!r}, {key} says {theirs!r}")


def _teachers(store: CacheStore, standing: _Standing) -> Iterator[Finding]:
    for name, document in standing.teachers.items():
        try:
            store.parameters(document)
            store.codes_reader(document, standing.cache)
        except StoreError:
            raise
        except KdcacheError as error:
            yield Finding(f"teacher {name!r}", str(error), name)
    for teacher in standing.complete.teachers if standing.complete else ():
        yield from _completed(store, standing, teacher)


def _completed(store: CacheStore, standing: _Standing, teacher: CompletedTeacher) -> Iterator[Finding]:
    """Hold what complete.json says of a teacher against what follows from its document and records."""
    where = f"teacher {teacher.name!r}"
    document = standing.teachers.get(teacher.name)
    if document is None:
        yield Finding(where, "its document is missing or cannot be read", teacher.name)
        return
    try:
        records = list(store.records(teacher.name).values())
    except StoreError:
        raise
    except KdcacheError:
        return  # the shard's own finding says it
    if not records:
        return
    expected = completed_teacher(document, records)
    for path, ours, theirs in differences(expected.to_mapping(), teacher.to_mapping()):
        yield Finding(where, f"{path} is {ours} by its document and records, complete.json says {theirs}", teacher.name)


def _whole(store: CacheStore, complete: CompleteDocument | None) -> Iterator[Finding]:
    if complete is None:
        return
    yield from (Finding(layout.COMPLETE, what) for what in _as_written(store, layout.COMPLETE, complete))
    data_digest = digest_of_digests(teacher.data_digest for teacher in complete.teachers)
    checks: tuple[tuple[str, Callable[[], str], str], ...] = (
        ("examples.parquet", store.examples_sha256, complete.examples_sha256),
        ("index", store.index_digest, complete.index_digest),
        ("plans", partial(_plan_digest, store, complete.plan_index), complete.plan_digest),
        ("complete.json", lambda: data_digest, complete.data_digest),
    )
    for where, measure, expected in checks:
        try:
            found = measure()
        except StoreError:
            raise
        except (KdcacheError, OSError, IndexError) as error:
            yield Finding(where, f"cannot be read: {error}")
            continue
        if found != expected:
            yield Finding(where, f"has digest {found}, complete.json says {expected}")
    yield from _root(store)


def _root(store: CacheStore) -> Iterator[Finding]:
    try:
        for difference in store.root_differences():
            yield Finding("zarr.json", difference)
    except StoreError:
        raise
    except KdcacheError as error:
        yield Finding("zarr.json", str(error))


def _plan_digest(store: CacheStore, plan_index: int) -> str:
    return store.plans()[plan_index].digest()
