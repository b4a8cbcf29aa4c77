"""Verifying documents: plans, metadata, parameters, completion, and what stands once a cache."""

from __future__ import annotations

__all__ = ["as_written", "check_completion", "check_documents", "check_whole"]

from collections.abc import Callable, Iterator

from kdcache.documents import (
    CompletedTeacher,
    Document,
    TeacherDocument,
    completed_teacher,
    differences,
    digest_of_digests,
)
from kdcache.errors import KdcacheError, StoreError
from kdcache.store import CacheStore, layout
from kdcache.store.files import CacheFiles, parsed_json
from kdcache.store.index_files import damaged_parts
from kdcache.store.nodes import expected_nodes, index_keys, root_differences
from kdcache.transfer_set import transfer_set_digest
from kdcache.verify.findings import Finding, Level, kind_of_error
from kdcache.verify.standing import Records, Standing, finding, plain_text


def check_documents(standing: Standing) -> Iterator[Finding]:
    """Hold plans, root, metadata and parameters against each other."""
    yield from _plans(standing)
    yield from _root(standing)
    yield from _nodes(standing)
    for document in standing.teachers.values():
        yield from _parameters(standing.store, document)
    for name in standing.names:
        key = layout.metadata_key(layout.teacher_group(name))
        if name in standing.completed and name not in standing.teachers and standing.store.objects.size(key) is None:
            where = f"teacher {name!r}"
            what = "its document is missing or cannot be read"
            yield finding(standing.store, key, what, "missing", where=where, teacher=name)


def as_written(store: CacheStore, key: str, document: Document) -> Iterator[str]:
    """Hold a document's file against the one way to write it: a bit may flip and leave the meaning as it was."""
    if store.objects.read(key) != document.to_json():
        yield f"the bytes of {key} are not as kdcache writes them: it was altered"


def check_whole(standing: Standing, level: Level) -> Iterator[Finding]:
    """Hold example table and index against the digests in complete.json; where there is none, against the plan."""
    if level == "quick":
        yield from _presence(standing, (layout.EXAMPLES, *index_keys(standing.cache)))
        yield from _footer(standing)
        return
    complete, store = standing.complete, standing.store
    if complete is None:
        yield from _examples_of_plan(standing)
        return
    yield from _digest(store, layout.EXAMPLES, store.examples_sha256, complete.examples_sha256)
    found = list(_presence(standing, index_keys(standing.cache)))
    yield from found or _index(standing, complete.index_digest)


def check_completion(standing: Standing, records: Records) -> Iterator[Finding]:
    """Hold what complete.json says against what follows from plans, teachers' documents and records."""
    complete, store = standing.complete, standing.store
    if complete is None:
        return
    yield from (_about_completion(store, what) for what in as_written(store, layout.COMPLETE, complete))
    data_digest = digest_of_digests(teacher.data_digest for teacher in complete.teachers)
    if data_digest != complete.data_digest:
        yield _about_completion(store, f"says data digest {complete.data_digest}, its teachers' give {data_digest}")
    plan = standing.plans.get(complete.plan_index)
    if plan is not None and plan.digest() != complete.plan_digest:
        key = layout.plan_key(complete.plan_index)
        what = f"has digest {plan.digest()}, complete.json says {complete.plan_digest}"
        yield finding(store, key, what, "contradicts", expected=complete.plan_digest, found=plan.digest())
    if complete.plan_index > max(standing.plans, default=-1):
        key = layout.plan_key(complete.plan_index)
        if store.objects.size(key) is None:
            yield finding(store, key, "the file is missing, which complete.json names", "missing")
    for teacher in complete.teachers:
        document, of_teacher = standing.teachers.get(teacher.name), records.get(teacher.name, {})
        if document is not None and len(of_teacher) == standing.cache.num_shards:
            yield from _completed(store, teacher, document, records)


def _completed(
    store: CacheStore, teacher: CompletedTeacher, document: TeacherDocument, records: Records
) -> Iterator[Finding]:
    expected = completed_teacher(document, [record for _, record in sorted(records[teacher.name].items())])
    for path, ours, theirs in differences(expected.to_mapping(), teacher.to_mapping()):
        what = f"{path} is {ours} by its document and records, complete.json says {theirs}"
        yield finding(
            store, layout.COMPLETE, what, "contradicts", where=f"teacher {teacher.name!r}", teacher=teacher.name,
            expected=str(ours), found=str(theirs),
        )  # fmt: skip


def _about_completion(store: CacheStore, what: str) -> Finding:
    return finding(store, layout.COMPLETE, what, "altered")


def _plans(standing: Standing) -> Iterator[Finding]:
    """Hold each plan against the one before it, and the root's cache document against them all."""
    store = standing.store
    for index, plan in standing.plans.items():
        key = layout.plan_key(index)
        yield from (finding(store, key, what, "altered") for what in as_written(store, key, plan))
        before = standing.plans.get(index - 1)
        if (index == 0 or before is not None) and plan.previous != (before.digest() if before else None):
            named = before.digest() if before else None
            what = f"names {plan.previous} as the plan before it, which is {named}"
            at_fault = layout.plan_key(index - 1) if _is_vouched(standing, index) and index else key
            sides = {"expected": str(named), "found": str(plan.previous)}
            yield finding(store, at_fault, what, "contradicts", where=key, **sides)
        for path, ours, theirs in differences(standing.cache.to_mapping(), plan.cache.to_mapping()):
            what = f"says {path} is {ours!r}, {key} says {theirs!r}"
            yield finding(store, layout.ROOT, what, "contradicts", expected=repr(theirs), found=repr(ours))


def _is_vouched(standing: Standing, index: int) -> bool:
    """Tell whether another document names a plan by its digest."""
    digest, complete, following = standing.plans[index].digest(), standing.complete, standing.plans.get(index + 1)
    if complete is not None and complete.plan_index == index:
        return digest == complete.plan_digest
    return following is not None and following.previous == digest


def _root(standing: Standing) -> Iterator[Finding]:
    """Hold the root's consolidated metadata against what its nodes must be; a node's own file is held by itself."""
    store = standing.store
    if standing.complete is None or any(item.key == layout.ROOT for item in standing.findings):
        return
    documents = [standing.teachers[name] for name in standing.completed if name in standing.teachers]
    try:
        found = root_differences(CacheFiles(store.objects), standing.cache, expected_nodes(standing.cache, documents))
    except StoreError:  # the store could not be asked, which says nothing of the cache
        raise
    except KdcacheError:  # of a node, whose own finding says it
        return
    yield from (finding(store, layout.ROOT, what, "contradicts") for what in found)


def _nodes(standing: Standing) -> Iterator[Finding]:
    """Hold the metadata of every group and array against what follows from the documents."""
    store = standing.store
    unfinished = {layout.teacher_group(name) for name in standing.names if name not in standing.completed}
    for path, accepted in expected_nodes(standing.cache, standing.teachers.values()).items():
        key = layout.metadata_key(path)
        may_come = standing.complete is None or any(path.startswith(f"{group}/") for group in unfinished)
        teacher = path.split("/")[1] if path.startswith(f"{layout.TEACHERS}/") else None
        where = key if teacher is None else f"teacher {teacher!r}"
        try:
            data = store.objects.read(key)
        except FileNotFoundError:
            if not may_come:
                yield finding(store, key, f"{key}: the file is missing", "missing", where=where, teacher=teacher)
            continue
        try:
            metadata = parsed_json(data)
        except (ValueError, RecursionError) as error:
            yield finding(store, key, f"{key} is no JSON ({error})", "torn", where=where, teacher=teacher)
            continue
        if metadata not in accepted:
            told = [f"{name}: expected {ours}, found {theirs}" for name, ours, theirs in differences(
                dict(accepted[0]), metadata)]  # fmt: skip
            what = f"{key} is not as the documents say ({'; '.join(told[:3])})"
            yield finding(store, key, what, "contradicts", where=where, teacher=teacher)


def _parameters(store: CacheStore, document: TeacherDocument) -> Iterator[Finding]:
    """Hold each parameter against its digest in the teacher's document."""
    for name, parameter in document.parameters.items():
        array = f"{layout.teacher_group(document.name)}/{document.parameters_group}/{name}"
        key = layout.chunk_key(array, (0,) * len(parameter.shape))
        try:
            store.parameters(document.model_copy(update={"parameters": {name: parameter}}))
        except StoreError:
            raise
        except KdcacheError as error:
            kind = kind_of_error(error, is_there=store.objects.size(key) is not None)
            where = f"teacher {document.name!r}"
            yield finding(store, key, plain_text(error), kind, where=where, teacher=document.name)


def _footer(standing: Standing) -> Iterator[Finding]:
    """Open the example table, if it stands: a cut one has no footer."""
    store = standing.store
    if not store.objects.size(layout.EXAMPLES):
        return
    try:
        store.example_values("num_rows", [0])
    except StoreError:
        raise
    except KdcacheError as error:
        yield finding(store, layout.EXAMPLES, plain_text(error), kind_of_error(error, is_there=True))


def _presence(standing: Standing, keys: tuple[str, ...]) -> Iterator[Finding]:
    """Find files that a finished cache must have; in an unfinished one they may still come."""
    if standing.complete is None:
        return
    nodes = {layout.metadata_key(path) for path in ("", *expected_nodes(standing.cache, ()))}
    for key in keys:
        if key not in nodes and not standing.store.objects.size(key):
            is_missing = standing.store.objects.size(key) is None
            what = "the file is missing" if is_missing else "the file is empty"
            yield finding(standing.store, key, what, "missing" if is_missing else "torn")


def _digest(store: CacheStore, key: str, measure: Callable[[], str], expected: str) -> Iterator[Finding]:
    try:
        found = measure()
    except StoreError:
        raise
    except (KdcacheError, OSError) as error:
        kind = (
            kind_of_error(error, is_there=store.objects.size(key) is not None)
            if isinstance(error, KdcacheError)
            else "missing"
        )
        yield finding(store, key, f"cannot be read: {plain_text(error)}", kind)
        return
    if found != expected:
        what = f"its bytes were changed: it has digest {found}, complete.json says {expected}"
        yield finding(store, key, what, "altered", expected=expected, found=found)


def _index(standing: Standing, expected: str) -> Iterator[Finding]:
    """Hold the index against its digest, which is over every file of its folder: one too many changes it, too."""
    store = standing.store
    found = store.index_digest()
    if found == expected:
        return
    extra = sorted(set(store.objects.list(layout.INDEX)) - set(index_keys(standing.cache)))
    for key in extra:
        yield finding(store, key, "is no file of an index, and spoils the digest over its folder", "extra")
    if not extra or store.index_digest(index_keys(standing.cache)) != expected:
        what = f"its bytes were changed: it has digest {found}, complete.json says {expected}"
        yield finding(store, layout.INDEX, what, "altered", expected=expected, found=found)


def _examples_of_plan(standing: Standing) -> Iterator[Finding]:
    """Hold the examples of an unfinished cache against the transfer set's digest, if they stand already."""
    store = standing.store
    if store.objects.size(layout.EXAMPLES) is None:
        return
    try:
        table = store.examples()
    except StoreError:
        raise
    except KdcacheError as error:
        yield finding(store, layout.EXAMPLES, plain_text(error), kind_of_error(error, is_there=True))
        return
    found = transfer_set_digest(table.example_ids, table.num_rows, table.labels, table.input_digests)
    expected = standing.cache.transfer_set_digest
    if found != expected:
        what = f"holds a transfer set of digest {found}, the cache's is {expected}"
        yield finding(store, layout.EXAMPLES, what, "contradicts", expected=expected, found=found)
        return
    for key, what in damaged_parts(CacheFiles(store.objects), table):
        yield finding(store, key, what.split(". Nothing was changed")[0], "altered")
