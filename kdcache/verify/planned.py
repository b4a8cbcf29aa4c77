"""Documents of teachers that complete.json does not name yet, held against their records, or else against the plan."""

from __future__ import annotations

__all__ = ["check_planned", "check_recorded", "contradictions", "is_begun", "unplanned_teachers"]

from collections import Counter
from collections.abc import Iterator
from typing import Any

from kdcache.codecs import codec_for
from kdcache.documents import Lossless, PlanDocument, RateTarget, Spectral, TeacherDocument, differences
from kdcache.errors import CodecError
from kdcache.store import CacheStore, layout
from kdcache.verify.findings import Finding
from kdcache.verify.standing import Records, Standing, finding, shard_place


def contradictions(plan: PlanDocument, document: TeacherDocument) -> list[str]:
    """Say where a stored teacher's document is not as the plan, and the codec that it names, make it.

    What the pilot decides is left: a basis' rank and, with a rate target, the codec but for the target itself.
    Parameters are held against their digests wherever they are read.

    Parameters
    ----------
    plan : PlanDocument
        One that names the teacher.
    document : TeacherDocument

    Returns
    -------
    list of str
        Empty where all is as planned.
    """
    try:
        told = list(differences(_planned(plan, document), _decided(document)))
    except CodecError as error:  # as of a basis without a rank, which no fit gives
        return [f"codec cannot be of these classes ({error})"]
    return [f"{path} is {theirs!r}, by the plan it is {ours!r}" for path, ours, theirs in told]


def is_begun(store: CacheStore, name: str) -> bool:
    """Tell whether a teacher has records: they name the document that its shards were encoded under."""
    return next(iter(store.objects.list(layout.records_folder(name))), None) is not None


def unplanned_teachers(standing: Standing) -> dict[str, list[str]]:
    """Give the contradictions of each teacher that has some, is not finished, and has no record."""
    plan = standing.plans[max(standing.plans)] if standing.plans else None
    found: dict[str, list[str]] = {}
    for name, document in standing.teachers.items():
        if plan is None or name in standing.completed or name not in plan.stored_names:
            continue
        told = contradictions(plan, document)
        if told and not is_begun(standing.store, name):
            found[name] = told
    return found


def check_planned(standing: Standing) -> Iterator[Finding]:
    """Find documents that were altered before their first shard was built."""
    for name, told in unplanned_teachers(standing).items():
        key = layout.metadata_key(layout.teacher_group(name))
        what = f"the document is not of the plan: {'; '.join(told)}"
        yield finding(standing.store, key, what, "contradicts", where=f"teacher {name!r}", teacher=name)


def check_recorded(standing: Standing, records: Records) -> Iterator[Finding]:
    """Hold documents against the records of the shards that were encoded under them.

    A record is at fault where no other document is named by more of them than the teacher's; else the document is.
    """
    for name, document in standing.teachers.items():
        named = Counter(record.document_digest for record in records[name].values() if record.document_digest)
        if name in standing.completed or not named:
            continue
        ours, (theirs, _) = document.digest(), named.most_common(1)[0]
        if named[ours] < named[theirs]:
            key = layout.metadata_key(layout.teacher_group(name))
            what = f"the document has digest {ours}, the teacher's shards were encoded under {theirs}"
            yield finding(
                standing.store, key, what, "contradicts", where=f"teacher {name!r}", teacher=name, expected=theirs,
                found=ours,
            )  # fmt: skip
            continue
        for shard_index, record in records[name].items():
            if record.document_digest not in {None, ours}:
                what = f"its record names the document {record.document_digest}, the teacher's is {ours}"
                yield finding(
                    standing.store, layout.record_key(name, shard_index), what, "contradicts",
                    where=shard_place(name, shard_index), teacher=name, shard_index=shard_index, expected=ours,
                    found=record.document_digest,
                )  # fmt: skip


def _decided(document: TeacherDocument) -> dict[str, Any]:
    fields = ("members", "weights", "num_classes", "codec", "num_columns", "chunk_rows", "storage_dtype")
    mapping = document.to_mapping()
    return {field: mapping.get(field) for field in fields}


def _planned(plan: PlanDocument, document: TeacherDocument) -> dict[str, Any]:
    """Give the fields as the plan has them, with those of the document where the pilot decides."""
    members = [teacher for teacher in plan.teachers if plan.cache.merge or teacher.name == document.name]
    decided, codec = _decided(document), codec_for(document.codec, plan.cache.num_classes)
    is_chosen = isinstance(plan.codec, RateTarget)
    return {
        "members": [teacher.to_mapping() for teacher in members],
        "weights": plan.to_mapping().get("weights"),
        "num_classes": plan.cache.num_classes,
        "codec": _planned_codec(plan, document),
        "num_columns": codec.num_columns,
        "chunk_rows": decided["chunk_rows"] if is_chosen and not plan.keeps_chunk_rows else None,
        "storage_dtype": codec.storage_dtype,
    }


def _planned_codec(plan: PlanDocument, document: TeacherDocument) -> dict[str, Any]:
    planned, found = plan.codec, document.codec
    if isinstance(planned, RateTarget):
        holds_target = planned.max_kl is not None and not isinstance(found, Lossless)
        return found.to_mapping() | ({"max_kl": planned.max_kl} if holds_target else {})
    if isinstance(planned, Spectral) and isinstance(found, Spectral) and found.rank is not None:
        most = found.rank if planned.rank is None else min(planned.rank, found.rank)
        return planned.to_mapping() | {"rank": most}
    return planned.to_mapping()
