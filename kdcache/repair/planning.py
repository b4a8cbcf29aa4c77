"""What is to be done about each finding. Pure but for reading documents: nothing is changed.

- A shard that is not as its record says is dropped with its record; a shard that is missing, its record alone.
- A record that cannot be read, or contradicts the layout, is dropped; its shard stays, for the build to adopt. A record
  whose bytes alone are unusual is written as it should be where complete.json vouches for its meaning.
- A shard without a record is what a stopped build leaves. It is dropped only where it cannot be decoded.
- Where complete.json and the records part: if the records' digest is the one that complete.json names, the fault is in
  complete.json; if only digests part, too, since records and certificate tell the same; if the certificates part under
  equal data, some record was altered, and no one can say which without the teacher: all of that teacher are dropped.
- What follows from other files is written anew. The rest needs the transfer set, the teacher, or a copy.
"""

from __future__ import annotations

__all__ = ["RepairPlan", "plan_repair"]

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kdcache.documents import (
    CompletedTeacher,
    PlanDocument,
    Record,
    TeacherDocument,
    completed_teacher,
    digest_of_digests,
)
from kdcache.errors import CorruptCacheError, KdcacheError, StoreError
from kdcache.repair.sources import plan_from_documents, teacher_from_root
from kdcache.store import layout
from kdcache.verify import Finding
from kdcache.verify.planned import unplanned_teachers
from kdcache.verify.standing import Standing


@dataclass
class RepairPlan:
    """What is to be done.

    Parameters
    ----------
    drop_records, drop_shards : mapping of key to Finding
        What is bad.
    drop_documents : mapping of str to Finding
        By name, teachers none of whose shards is built, whose documents are not of the plan.
    write : mapping of key to Finding
        Files that follow from what else stands: root, metadata, index, plans, teachers' documents, records.
    plans, teachers, records : mapping
        The documents among them, by number, name and key.
    fit : mapping of key to Finding
        Parameters to be fitted again.
    examples : Finding or None
        That of the example table.
    build : list of Finding
        Records that are missing.
    cannot : list of Finding
        What no source is left for.
    rewrites_completion : bool
        Whether complete.json is to be written from the records.
    """

    drop_records: dict[str, Finding] = field(default_factory=dict)
    drop_shards: dict[str, Finding] = field(default_factory=dict)
    drop_documents: dict[str, Finding] = field(default_factory=dict)
    write: dict[str, Finding] = field(default_factory=dict)
    plans: dict[int, PlanDocument] = field(default_factory=dict)
    teachers: dict[str, TeacherDocument] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    fit: dict[str, Finding] = field(default_factory=dict)
    examples: Finding | None = None
    build: list[Finding] = field(default_factory=list)
    cannot: list[Finding] = field(default_factory=list)
    rewrites_completion: bool = False

    def drops_from(self, names: tuple[str, ...]) -> bool:
        """Tell whether anything of these teachers is dropped or missing, so that nothing may vouch for them."""
        found = (*self.drop_records.values(), *self.drop_shards.values(), *self.build)
        return any(item.teacher in names and item.kind != "extra" for item in found)


_UNKNOWN = re.compile(r"\[extra_forbidden\]|format_version: [^\n]*\[")


def plan_repair(
    standing: Standing, findings: tuple[Finding, ...], *, proposed: PlanDocument | None = None
) -> RepairPlan:
    """Decide what is to be done about the findings of `verify_cache` at level ``digests``.

    Parameters
    ----------
    standing : Standing
    findings : tuple of Finding
    proposed : PlanDocument, optional
        What the job file plans, to put a lost plan back.
    """
    _refuse_later_release(standing, findings)
    plan = RepairPlan()
    vouched = _vouched_records(standing, findings)
    judged: set[str | None] = set()
    for item in findings:
        first = item.key.split("/")[0]
        if item.kind in {"hole", "not_finite", "differs_from_teacher"}:
            plan.cannot.append(item)
        elif item.shard_index is not None:
            _of_shard(plan, item, vouched)
        elif first == layout.PLANS:
            _of_plan(plan, standing, item, proposed)
        elif item.key == layout.EXAMPLES:
            plan.examples = item
        elif item.key == layout.COMPLETE:
            if item.teacher not in judged:
                _of_completion(plan, standing, item)
            judged.add(item.teacher)
        elif first == layout.INDEX and item.kind == "extra":
            plan.cannot.append(item)
        elif first == layout.TEACHERS and item.teacher is not None:
            _of_teacher(plan, standing, item)
        else:
            plan.write[item.key] = item
    return plan


def _of_shard(plan: RepairPlan, item: Finding, vouched: Mapping[str, Record]) -> None:
    name, shard = str(item.teacher), item.shard_index or 0
    record_key, shard_key = layout.record_key(name, shard), layout.shard_key(name, shard)
    if item.key == record_key and item.kind == "missing":
        plan.build.append(item)
    elif item.key == record_key and item.kind == "altered" and record_key in vouched:
        plan.write[record_key], plan.records[record_key] = item, vouched[record_key]
    elif item.key == record_key:
        plan.drop_records[record_key] = item
    elif item.kind == "extra":
        plan.drop_shards[shard_key] = item
    else:
        if item.kind != "missing":
            plan.drop_shards[shard_key] = item
        if item.expected is not None or item.kind == "missing":  # it was held against a record
            plan.drop_records[record_key] = item


def _of_plan(plan: RepairPlan, standing: Standing, item: Finding, proposed: PlanDocument | None) -> None:
    index = int(item.key.rsplit("/", 1)[1].removesuffix(".json"))
    found = plan_from_documents(standing, index, proposed)
    if found is not None:
        plan.plans[index], plan.write[item.key] = found, item
    elif proposed is not None and standing.plans.get(index) == proposed and item.found is not None:
        plan.rewrites_completion = True  # the plan is the job's: complete.json names another digest
    else:
        plan.cannot.append(item)


def _of_teacher(plan: RepairPlan, standing: Standing, item: Finding) -> None:
    name = str(item.teacher)
    document_key = layout.metadata_key(layout.teacher_group(name))
    if item.key == document_key and (name not in standing.teachers or item.expected is not None):
        found = teacher_from_root(standing, name)
        if found is None or item.expected not in {None, found.digest()}:
            plan.cannot.append(item)
        else:
            plan.teachers[name], plan.write[item.key] = found, item
    elif item.key == document_key and name in unplanned_teachers(standing):
        plan.drop_documents[name] = item
    elif item.key.endswith(f"/{layout.METADATA}"):
        plan.write[item.key] = item
    else:
        plan.fit[item.key] = item


def _of_completion(plan: RepairPlan, standing: Standing, item: Finding) -> None:
    name = item.teacher
    if name is None or standing.complete is None:
        plan.rewrites_completion = True
        return
    told = next(teacher for teacher in standing.complete.teachers if teacher.name == name)
    document, records = standing.teachers[name], standing.store.records(name)
    copy = teacher_from_root(standing, name)
    if told.document_digest != document.digest() and copy is not None and copy != document:
        key = layout.metadata_key(layout.teacher_group(name))
        plan.teachers[name], plan.write[key] = copy, item
    elif _is_record_altered(completed_teacher(document, list(records.values())), told):
        for shard in records:
            plan.drop_records[layout.record_key(name, shard)] = item
    elif told.document_digest != document.digest() and copy is None and not _is_recorded(document, records.values()):
        plan.cannot.append(item)  # nobody but the document itself says that it is right
    else:
        plan.rewrites_completion = True


def _is_recorded(document: TeacherDocument, records: Iterable[Record]) -> bool:
    """Tell whether a teacher's shards were encoded under this document, as their records say."""
    return {record.document_digest for record in records} == {document.digest()}


def _refuse_later_release(standing: Standing, findings: Iterable[Finding]) -> None:
    """Stop where documents have fields that are not known here: a later release's are no damage."""
    unknown = [item.key for item in findings if _UNKNOWN.search(item.what) and "[missing]" not in item.what]
    if len(unknown) > 1:  # a flipped bit makes one
        raise CorruptCacheError(
            f"{standing.store.address}: {len(unknown)} documents, such as {unknown[0]}, have fields that this release "
            "does not know: a later one wrote them. Nothing was changed. Verify and repair with that release"
        )


def _is_record_altered(by_records: CompletedTeacher, told: CompletedTeacher) -> bool:
    return (
        by_records.records_digest != told.records_digest
        and by_records.data_digest == told.data_digest
        and by_records.certificate != told.certificate
    )


def _vouched_records(standing: Standing, findings: tuple[Finding, ...]) -> dict[str, Record]:
    """Give the records whose meaning complete.json vouches for, of teachers with a record that is written otherwise."""
    about = {item.teacher for item in findings if item.kind == "altered" and item.key.startswith(f"{layout.RECORDS}/")}
    vouched: dict[str, Record] = {}
    for teacher in standing.complete.teachers if standing.complete else ():
        if teacher.name not in about:
            continue
        try:
            records = standing.store.records(teacher.name)
        except StoreError:  # the store could not be asked, which says nothing of the cache
            raise
        except KdcacheError:
            continue
        if digest_of_digests(record.digest() for record in records.values()) == teacher.records_digest:
            vouched |= {layout.record_key(teacher.name, shard): record for shard, record in records.items()}
    return vouched
