"""Opening a cache: nothing but its documents is read, so that it costs the same however many rows it holds."""

from __future__ import annotations

__all__ = ["LOCAL_CACHE_BYTES", "open_cache"]

import os
from collections.abc import Mapping, Sequence

from kdcache.cache.reading import SoftTargetCache
from kdcache.documents import CacheDocument, CompleteDocument, TeacherDocument
from kdcache.errors import CorruptCacheError, IncompleteCacheError
from kdcache.store import CacheStore, KeptPages, layout
from kdcache.store.vouched import VouchedRecords

LOCAL_CACHE_BYTES = 10 * 2**30
"""What parts of far caches may take in a local folder, where nothing is said."""


def open_cache(
    address: str | os.PathLike[str],
    *,
    allow_incomplete: bool = False,
    local_cache: str | os.PathLike[str] | None = None,
    local_cache_bytes: int = LOCAL_CACHE_BYTES,
) -> SoftTargetCache:
    """Open a cache for reading; nothing but its documents is read.

    Parameters
    ----------
    address : str or path
        Where the cache stands.
    allow_incomplete : bool
        Open a cache whose build has not finished; what is read then carries a mask of the rows that are there.
    local_cache : path, optional
        Local folder in which parts of a finished cache are kept as they are read, still compressed: for one that lies
        far away. Several caches and processes may share it.
    local_cache_bytes : int
        What that folder may take, at least 16 MiB; what was used longest ago is dropped.

    Raises
    ------
    CacheNotFoundError
        No cache stands there.
    IncompleteCacheError
        The build has not finished; or it has not, and parts were to be kept locally.
    OptionError
        `local_cache_bytes` is below 16 MiB.
    DocumentError
        A document of the cache breaks its schema, or is of a format version that this release cannot read.
    CorruptCacheError
        A teacher that the finished cache had is gone, or its document contradicts the cache's.
    """
    store = CacheStore.at(address)
    document = store.cache_document()
    complete = store.complete()
    if complete is None and not allow_incomplete:
        raise IncompleteCacheError(
            f"cache {store.address} is not complete: there is no complete.json. See how far it is with `kdcache status "
            f"{store.address}`, and run its build again to finish it, or, if all shards are there, `kdcache repair "
            f"{store.address}`. To read what is there, "
            "open_cache(..., allow_incomplete=True)"
        )
    names = _teacher_names(store, complete)
    teachers = {name: teacher for name in names if (teacher := store.teacher_of(name, document)) is not None}
    if complete is not None:
        _check_bound(store, document, complete, teachers)
    missing = [f"teachers/{name}/zarr.json" for name in names if name not in teachers]
    if complete is not None and missing:
        raise CorruptCacheError(
            f"cache {store.address}: {', '.join(missing)} is missing, which complete.json names; an ensemble without a "
            "member would give other soft targets. Nothing was changed. "
            f"Run `kdcache verify {store.address}` to see all damage; `kdcache repair {store.address}` brings the "
            "files back where the root's copies of them are whole"
        )
    cache = SoftTargetCache(store, document, complete, teachers)
    return cache if local_cache is None else _kept_locally(cache, local_cache, local_cache_bytes)


def _check_bound(
    store: CacheStore,
    document: CacheDocument,
    complete: CompleteDocument,
    teachers: Mapping[str, TeacherDocument],
) -> None:
    """Refuse documents that complete.json does not vouch for: another cache's are sound in themselves."""
    plan = store.plan(complete.plan_index)
    others = [
        layout.metadata_key(layout.teacher_group(teacher.name))
        for teacher in complete.teachers
        if teacher.name in teachers and teachers[teacher.name].digest() != teacher.document_digest
    ]
    if plan is None or plan.digest() != complete.plan_digest:
        others.append(layout.plan_key(complete.plan_index))
    elif plan.cache != document:
        others.append(layout.ROOT)
    if others:
        raise CorruptCacheError(
            f"cache {store.address}: {', '.join(others)} is not what complete.json vouches for, so that rows would be "
            f"read as something else. Nothing was changed. Run `kdcache verify {store.address}` to see all damage; "
            "`kdcache repair JOB`, with the cache's job file, writes anew what follows from other files or from the job"
        )


def _kept_locally(cache: SoftTargetCache, folder: str | os.PathLike[str], max_bytes: int) -> SoftTargetCache:
    cache.require_complete("kept locally")
    identity = "" if cache.complete is None else cache.complete.digest()
    vouched = {
        layout.records_folder(teacher.name): VouchedRecords(teacher.num_shards, teacher.records_digest)
        for teacher in (() if cache.complete is None else cache.complete.teachers)
    }
    pages = KeptPages(cache.store.objects, folder, identity=identity, max_bytes=max_bytes, vouched=vouched)
    return SoftTargetCache(CacheStore(pages), cache.document, cache.complete, cache.teachers)


def _teacher_names(store: CacheStore, complete: CompleteDocument | None) -> Sequence[str]:
    if complete is not None:
        return [teacher.name for teacher in complete.teachers]
    plans = store.plans()
    return plans[-1].stored_names if plans else ()
