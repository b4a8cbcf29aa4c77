"""Status: how far a build is, read from the records alone."""

from __future__ import annotations

__all__ = ["CacheStatus", "TeacherStatus", "read_status"]

import os
from dataclasses import dataclass

from kdcache.documents import PlanDocument
from kdcache.errors import CacheNotFoundError
from kdcache.store import CacheStore


@dataclass(frozen=True)
class TeacherStatus:
    """One stored teacher's shards, rows and bytes that are published, and that there are to be."""

    name: str
    done_shards: int
    num_shards: int
    done_rows: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class CacheStatus:
    """How far a build is.

    Parameters
    ----------
    address : str
    plan : PlanDocument
        The plan in force.
    is_complete : bool
        Whether complete.json stands for this plan.
    teachers : tuple of TeacherStatus
    """

    address: str
    plan: PlanDocument
    is_complete: bool
    teachers: tuple[TeacherStatus, ...]


def read_status(address: str | os.PathLike[str]) -> CacheStatus:
    """Read how far a build is; no shard is opened.

    Raises
    ------
    CacheNotFoundError
        No build was begun there.
    """
    store = CacheStore.at(address)
    plans = store.plans()
    if not plans:
        raise CacheNotFoundError(
            f"{store.address} holds no cache and no plan of one. Check the address, or run `kdcache build JOB`"
        )
    plan = plans[-1]
    complete = store.complete()
    is_complete = complete is not None and complete.plan_digest == plan.digest()
    teachers = tuple(_teacher(store, plan, name) for name in plan.stored_names)
    return CacheStatus(store.address, plan, is_complete, teachers)


def _teacher(store: CacheStore, plan: PlanDocument, name: str) -> TeacherStatus:
    records = store.records(name)
    return TeacherStatus(
        name=name,
        done_shards=len(records),
        num_shards=plan.cache.num_shards,
        done_rows=sum(record.num_rows for record in records.values()),
        num_rows=plan.cache.num_rows * plan.cache.num_views,
        num_bytes=sum(record.num_bytes for record in records.values()),
    )
