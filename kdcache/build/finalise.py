"""Finalise: check that every record stands, sum up the certificates, consolidate the metadata, then say complete."""

from __future__ import annotations

__all__ = ["finalise"]

from kdcache.documents import (
    CompleteDocument,
    CompletedTeacher,
    PlanDocument,
    completed_teacher,
    digest_of_digests,
)
from kdcache.errors import CorruptCacheError, IncompleteCacheError
from kdcache.store import CacheStore


def finalise(store: CacheStore, plan_index: int, plan: PlanDocument, *, is_repair: bool = False) -> CompleteDocument:
    """Publish complete.json for a plan all of whose tasks are done.

    A late builder of an earlier plan changes nothing: what a later plan completed stays.

    Parameters
    ----------
    store : CacheStore
    plan_index : int
        The plan's number.
    plan : PlanDocument

    Raises
    ------
    IncompleteCacheError
        A shard has no record.
    CorruptCacheError
        zarr-python cannot open what was stored; or a teacher that is complete already is no longer what complete.json
        vouches for. Only a repair, which has looked at everything, may vouch for something else.
    """
    before = None if is_repair else store.complete()
    teachers = tuple(_completed(store, plan, name) for name in plan.stored_names)
    for teacher in teachers:
        _refuse_change(store, before, teacher)
    complete = CompleteDocument.make(
        plan_index=plan_index,
        plan_digest=plan.digest(),
        examples_sha256=store.examples_sha256(),
        index_digest=store.index_digest(),
        fences_sha256=store.fences_sha256(),
        teachers=teachers,
        data_digest=digest_of_digests(teacher.data_digest for teacher in teachers),
    )
    store.consolidate()
    store.check_zarr(plan.stored_names, plan.cache)
    standing = store.complete()
    if standing is not None and standing.plan_index > plan_index:
        return standing
    store.replace_complete(complete)
    store.remove_stale_partials()
    return complete


def _refuse_change(store: CacheStore, before: CompleteDocument | None, teacher: CompletedTeacher) -> None:
    for vouched in before.teachers if before is not None else ():
        if vouched.name == teacher.name and vouched != teacher:
            raise CorruptCacheError(
                f"cache {store.address}: teacher {teacher.name!r} is no longer what complete.json vouches for: its "
                f"document or its records were altered. Nothing was changed. Run `kdcache verify {store.address}` to "
                "see all damage, `kdcache repair` to mend it, and then the same command again"
            )


def _completed(store: CacheStore, plan: PlanDocument, name: str) -> CompletedTeacher:
    records = store.records(name)
    missing = [shard for shard in range(plan.cache.num_shards) if shard not in records]
    document = store.teacher(name)
    if missing or document is None:
        raise IncompleteCacheError(
            f"cache {store.address}: teacher {name!r} lacks {len(missing)} of {plan.cache.num_shards} shards "
            f"({missing[:10]}); the cache stays as it was. Run the build with this teacher again"
        )
    encoded_under = {record.document_digest for record in records.values()} - {None, document.digest()}
    if encoded_under:
        raise CorruptCacheError(
            f"cache {store.address}: the document of teacher {name!r} is not the one that its shards were encoded "
            f"under, so that no reader would take them. complete.json was not written. Bring teachers/{name}/zarr.json "
            "back from a copy, and run the same command again"
        )
    return completed_teacher(document, [records[shard] for shard in range(plan.cache.num_shards)])
