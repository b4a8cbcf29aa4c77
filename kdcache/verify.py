"""Verifying: hold every stored file against the digest that vouches for it. Changes nothing."""

from __future__ import annotations

__all__ = ["Finding", "VerifyReport", "verify_cache"]

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kdcache.cache import SoftTargetCache, open_cache
from kdcache.documents import CompleteDocument, CompletedTeacher, Record
from kdcache.errors import KdcacheError
from kdcache.store import CacheStore


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
    """
    cache = open_cache(address, allow_incomplete=True)
    store = CacheStore.at(address)
    findings = [*_teachers(cache, store), *_whole(store, cache.complete)]
    num_shards, num_bytes = 0, 0
    total = cache.document.num_shards * len(cache.teachers)
    for name in cache.teachers:
        for shard in range(cache.document.num_shards):
            size, found = _shard(cache, store, name, shard)
            findings += found
            num_shards, num_bytes = num_shards + 1, num_bytes + size
            if on_progress is not None:
                on_progress(num_shards, total)
    return VerifyReport(store.address, cache.complete is not None, num_shards, num_bytes, tuple(findings))


def _shard(cache: SoftTargetCache, store: CacheStore, name: str, shard: int) -> tuple[int, list[Finding]]:
    where = f"teacher {name!r}, shard {shard}"
    try:
        record = store.record(name, shard)
        if record is None:
            missing = Finding(where, "there is no record", name, shard)
            return 0, [] if cache.complete is None else [missing]
        data = store.shard_bytes(name, shard)
    except KdcacheError as error:
        return 0, [Finding(where, str(error), name, shard)]
    return len(data), [Finding(where, what, name, shard) for what in _disagreements(cache, record, data)]


def _disagreements(cache: SoftTargetCache, record: Record, data: bytes) -> Iterator[str]:
    expected_rows = cache.document.rows_in_shard(record.shard_index)
    if record.num_rows != expected_rows:
        yield f"its record says {record.num_rows} rows, the layout {expected_rows}"
    if len(data) != record.num_bytes:
        yield f"it has {len(data)} bytes, its record says {record.num_bytes}"
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        yield f"it has digest {digest}, its record says {record.sha256}"


def _teachers(cache: SoftTargetCache, store: CacheStore) -> Iterator[Finding]:
    for name, document in cache.teachers.items():
        try:
            store.parameters(document)
            store.codes_reader(document, cache.document)
        except KdcacheError as error:
            yield Finding(f"teacher {name!r}", str(error), name)
    for teacher in cache.complete.teachers if cache.complete else ():
        yield from _completed(cache, store, teacher)


def _completed(cache: SoftTargetCache, store: CacheStore, teacher: CompletedTeacher) -> Iterator[Finding]:
    where = f"teacher {teacher.name!r}"
    document = cache.teachers.get(teacher.name)
    if document is None:
        yield Finding(where, "its document is missing", teacher.name)
    elif document.digest() != teacher.document_digest:
        yield Finding(where, "its document has another digest than complete.json says", teacher.name)
    try:
        records = [record for _, record in sorted(store.records(teacher.name).items())]
    except KdcacheError:
        return  # the shard's own finding says it
    digest = hashlib.sha256("\n".join(record.digest() for record in records).encode()).hexdigest()
    if digest != teacher.records_digest:
        yield Finding(where, "its records have another digest than complete.json says", teacher.name)


def _whole(store: CacheStore, complete: CompleteDocument | None) -> Iterator[Finding]:
    if complete is None:
        return
    checks = (
        ("examples.parquet", store.examples_sha256, complete.examples_sha256),
        ("index", store.index_digest, complete.index_digest),
        ("plans", functools.partial(_plan_digest, store, complete.plan_index), complete.plan_digest),
    )
    for where, measure, expected in checks:
        try:
            found = measure()
        except (KdcacheError, OSError, IndexError) as error:
            yield Finding(where, f"cannot be read: {error}")
            continue
        if found != expected:
            yield Finding(where, f"has digest {found}, complete.json says {expected}")


def _plan_digest(store: CacheStore, plan_index: int) -> str:
    return store.plans()[plan_index].digest()
