"""What stands of a cache: its documents, as far as they can be read, and findings for those that cannot."""

from __future__ import annotations

__all__ = ["Records", "Standing", "finding", "plain_text", "remedy_for", "shard_place"]

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kdcache.documents import CacheDocument, CompleteDocument, PlanDocument, Record, TeacherDocument
from kdcache.errors import CacheNotFoundError, KdcacheError, StoreError
from kdcache.store import CacheStore, layout
from kdcache.store.files import CacheFiles
from kdcache.store.index import CHUNK_ENTRIES, SHARD_CHUNKS
from kdcache.verify.findings import Finding, Kind, kind_of_error

Value = TypeVar("Value")

_NEVER_REFUSED = 2**16
"""Files that are looked for one by one, however few of them stand."""
_FILES_FOR_EACH = 1000
"""A finished cache that lost all but one of so many files is no cache any more, or its document is not its own."""
_MISSING_PLANS = 100
"""Plans before the last that may be missing one by one; more were never there."""


@dataclass(frozen=True)
class Standing:
    """The documents of a cache.

    Parameters
    ----------
    store : CacheStore
    cache : CacheDocument
        The root's; a plan's where the root's cannot be read.
    plans : mapping of int to PlanDocument
        Those that could be read, by number, ascending.
    complete : CompleteDocument or None
        None while the build has not finished, or where it cannot be read.
    teachers : mapping of str to TeacherDocument
        Those that could be read.
    completed : tuple of str
        Stored teachers that complete.json names.
    names : tuple of str
        These, and those that are being added.
    findings : tuple of Finding
    """

    store: CacheStore
    cache: CacheDocument
    plans: Mapping[int, PlanDocument]
    complete: CompleteDocument | None
    teachers: Mapping[str, TeacherDocument]
    completed: tuple[str, ...]
    names: tuple[str, ...]
    findings: tuple[Finding, ...]

    @classmethod
    def read(cls, store: CacheStore) -> Standing:
        """Read the documents.

        Raises
        ------
        CacheNotFoundError
            No cache stands there.
        DocumentError, CorruptCacheError
            Neither the root's cache document nor a plan can be read, so nothing can be said of the rest.
        """
        findings: list[Finding] = []
        plans = _plans(store, findings)
        cache = _cache(store, plans, findings)
        if any(item.key == layout.ROOT for item in findings):
            store = store.told(cache)  # what else is found is to be about the file that it is found in
        complete = _attempt(store, findings, layout.COMPLETE, layout.COMPLETE, store.complete)
        _refuse_impossible(store, cache)
        completed = tuple(teacher.name for teacher in complete.teachers) if complete else ()
        planned = plans[max(plans)].stored_names if plans else ()
        names = (*completed, *(name for name in planned if name not in completed))
        teachers = {}
        for name in names:
            key = layout.metadata_key(layout.teacher_group(name))
            read = partial(store.teacher_of, name, cache)
            if (document := _attempt(store, findings, f"teacher {name!r}", key, read, teacher=name)) is not None:
                teachers[name] = document
        return cls(store, cache, plans, complete, teachers, completed, names, tuple(findings))


def _refuse_impossible(store: CacheStore, cache: CacheDocument) -> None:
    """Refuse a finished cache whose document tells of far more files than stand: each would be looked for, for ever."""
    num_files = max(cache.num_shards, cache.num_examples // (SHARD_CHUNKS * CHUNK_ENTRIES))
    if num_files <= _NEVER_REFUSED or store.objects.size(layout.COMPLETE) is None:
        return
    standing = sum(1 for _ in store.objects.list(""))
    if num_files > _FILES_FOR_EACH * standing:
        raise (
            CacheFiles(store.objects)
            .place(layout.ROOT)
            .corrupt(
                f"the cache document tells of {cache.num_examples} examples in {cache.num_shards} shards, "
                f"where {standing} files stand"
            )
        )


def finding(store: CacheStore, key: str, what: str, kind: Kind, *, where: str | None = None, **more: Any) -> Finding:
    """Make a finding about a file, with the remedy that goes with it."""
    remedy = remedy_for(store.address, key, kind)
    return Finding(where=where or key, what=what, kind=kind, key=key, remedy=remedy, **more)


def remedy_for(address: str, key: str, kind: Kind) -> str:
    """Say which command mends a file."""
    parts = key.split("/")
    anew = f"`kdcache repair {address}` makes it anew; no teacher is needed."
    if kind in {"hole", "not_finite", "differs_from_teacher"}:
        return "The file is as it was built: build the cache anew at another address."
    if kind == "extra" and parts[0] == layout.INDEX:
        return "Move the file out of the cache."
    if parts[0] == layout.RECORDS or (len(parts) > 3 and parts[2] == layout.CODES and parts[3] == "c"):
        return f"`kdcache repair {address}` drops it; `kdcache repair JOB`, with its job file, also builds it anew."
    if parts[0] == layout.PLANS:
        return f"`kdcache repair {address}` writes it anew where other documents tell it; else bring the file back."
    if key == layout.EXAMPLES:
        return "`kdcache repair JOB`, with the cache's job file, makes it anew from the transfer set."
    is_parameter = parts[0] == layout.TEACHERS and "c" in parts[4:5]
    return "`kdcache repair JOB`, with the cache's job file, fits it again." if is_parameter else anew


def plain_text(error: Exception) -> str:
    """Give an error's message without what it says of state and remedy: a finding says these by itself."""
    return re.split(r"[.\n]\s*Nothing was changed", str(error))[0].rstrip()


def _cache(store: CacheStore, plans: Mapping[int, PlanDocument], findings: list[Finding]) -> CacheDocument:
    try:
        return store.cache_document()
    except StoreError:  # the store could not be asked, which says nothing of the cache
        raise
    except KdcacheError as error:
        if not plans:
            raise
        kind = kind_of_error(error, is_there=not isinstance(error, CacheNotFoundError))
        if kind == "missing" and all(key.startswith(f"{layout.PLANS}/") for key in store.objects.list("")):
            return plans[max(plans)].cache  # a build stopped just after it had written its plan
        what = "the file is missing" if kind == "missing" else plain_text(error)
        findings.append(finding(store, layout.ROOT, what, kind))
        return plans[max(plans)].cache


def _plans(store: CacheStore, findings: list[Finding]) -> dict[int, PlanDocument]:
    """Read every plan that stands; `CacheStore.plans` ends at the first that does not."""
    files = CacheFiles(store.objects)
    names = [key.rsplit("/", 1)[1].removesuffix(".json") for key in store.objects.list(layout.PLANS)]
    standing = sorted(int(name) for name in names if name.isdecimal())
    plans = {}
    highest = min(standing[-1], len(standing) + _MISSING_PLANS) if standing else -1
    beyond = [number for number in standing if number > highest]
    for index in beyond:
        what = f"its number is {index}, where {len(standing) - len(beyond)} plan(s) stand: they are numbered one by one"
        findings.append(finding(store, layout.plan_key(index), what, "contradicts"))
    for index in range(highest + 1):
        key = layout.plan_key(index)
        if index not in standing:
            findings.append(finding(store, key, "the file is missing", "missing"))
            continue
        plan = _attempt(store, findings, key, key, partial(files.read_document, PlanDocument, key))
        if plan is not None:
            plans[index] = plan
    return plans


def _attempt(
    store: CacheStore, findings: list[Finding], where: str, key: str, read: Callable[[], Value], **more: Any
) -> Value | None:
    try:
        return read()
    except StoreError:
        raise
    except (KdcacheError, OSError) as error:
        kind = kind_of_error(error, is_there=store.objects.size(key) is not None)
        findings.append(finding(store, key, plain_text(error), kind, where=where, **more))
        return None


def shard_place(name: str, shard_index: int) -> str:
    """Name a shard for a person."""
    return f"teacher {name!r}, shard {shard_index}"


Records = dict[str, dict[int, Record]]
"""Records that could be read, by teacher and shard."""
