"""Where damaged documents can be taken from: others that tell the same, held against the digests that name them.

A plan follows from the plan after it, or from the one before it and the teachers' documents. A teacher's document
stands once more in the root's consolidated metadata. Nothing is taken that a digest does not vouch for.
"""

from __future__ import annotations

__all__ = ["finished_plan_by_root", "plan_from_documents", "teacher_from_root"]

import re
from collections.abc import Iterator
from typing import Any

from kdcache.documents import PlanDocument, TeacherDocument
from kdcache.errors import CorruptCacheError, DocumentError
from kdcache.store import layout
from kdcache.store.files import ATTRIBUTE, CacheFiles
from kdcache.store.nodes import gathered_metadata
from kdcache.store.teachers import check_teacher
from kdcache.verify.standing import Standing


def plan_from_documents(standing: Standing, index: int, proposed: PlanDocument | None = None) -> PlanDocument | None:
    """Find the plan of a number in what other documents tell; None where nothing is vouched for by its digest.

    Parameters
    ----------
    standing : Standing
    index : int
        The plan's number.
    proposed : PlanDocument, optional
        What a job file or a caller plans: taken where it is the very plan.
    """
    complete, following = standing.complete, standing.plans.get(index + 1)
    digests = {following.previous} if following is not None else set()
    if complete is not None and complete.plan_index == index:
        digests.add(complete.plan_digest)
    candidates = _candidates(standing, index, proposed)
    return next((plan for plan in candidates if plan.digest() in digests), None)


def finished_plan_by_root(standing: Standing) -> int | None:
    """Find the newest plan whose very teachers the root gathers, as the last finished build left it; None if none is.

    For a cache whose complete.json is gone: a teacher that is being added is planned already, and not gathered yet.
    """
    group = re.compile(rf"{layout.TEACHERS}/([^/]+)")
    gathered = gathered_metadata(CacheFiles(standing.store.objects))
    names = {found[1] for path in gathered if (found := group.fullmatch(path))}
    numbers = (
        number for number, plan in sorted(standing.plans.items(), reverse=True) if set(plan.stored_names) == names
    )
    return next(numbers, None)


def teacher_from_root(standing: Standing, name: str) -> TeacherDocument | None:
    """Read the copy of a teacher's document in the root; None where it is not the one that complete.json names."""
    told: Any = gathered_metadata(CacheFiles(standing.store.objects)).get(layout.teacher_group(name))
    try:
        document = TeacherDocument.from_mapping(told["attributes"][ATTRIBUTE], source="the root's copy")
    except (DocumentError, KeyError, TypeError):
        return None
    named = (
        [item.document_digest for item in standing.complete.teachers if item.name == name] if standing.complete else []
    )
    if document.name != name or named not in ([], [document.digest()]):
        return None
    try:
        check_teacher(document, standing.cache, place=standing.store.teacher_place(name))
    except CorruptCacheError:
        return None
    return document


def _candidates(standing: Standing, index: int, proposed: PlanDocument | None) -> Iterator[PlanDocument]:
    if index in standing.plans:
        yield standing.plans[index]
    before, following = standing.plans.get(index - 1), standing.plans.get(index + 1)
    previous = before.digest() if before is not None else None
    if following is not None:
        for count in range(1, len(following.teachers)):
            yield _changed(following, teachers=following.teachers[:count], previous=previous)
    if before is not None and standing.complete is not None and before.cache.merge is None:
        known = {teacher.name for teacher in before.teachers}
        documents = [standing.teachers[name] for name in standing.completed if name in standing.teachers]
        new = [member for document in documents for member in document.members if member.name not in known]
        if new:
            yield _changed(before, teachers=(*before.teachers, *new), previous=previous)
    if proposed is not None:
        yield _changed(proposed, previous=previous)


def _changed(plan: PlanDocument, **changes: object) -> PlanDocument:
    return PlanDocument.make(**{**dict(plan), **changes})
