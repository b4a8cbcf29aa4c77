"""Building a cache: plan, pilot, tasks, finalise. Safe to stop at any moment and to run again."""

from __future__ import annotations

__all__ = ["BuildProgress", "build_cache", "plan_cache"]

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdcache.build.executors import Executor, open_executor
from kdcache.build.finalise import finalise
from kdcache.build.inference import BatchLogits, Inputs
from kdcache.build.pilot import Forecast, Pilot, run_pilot
from kdcache.build.plan import Merge, extend_plan, make_plan, refuse_other_plan
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.task import remaining_shards
from kdcache.build.teachers import Autocast, MergedTeacher, ModuleTeacher, SourcedTeacher, Teacher
from kdcache.build.work import MERGED_NAME, StoredTeacher, Work
from kdcache.cache import SoftTargetCache, open_cache
from kdcache.codecs import codec_for
from kdcache.documents import (
    CodecSpec,
    Codes,
    ExecutorSpec,
    Fingerprint,
    InProcess,
    PlanDocument,
    Record,
    TeacherDocument,
)
from kdcache.errors import CacheExistsError, JobError
from kdcache.store import CacheStore, ExampleTable
from kdcache.transfer_set import TransferSet

Teachers = Mapping[str, nn.Module | Teacher] | Sequence[Teacher]
Address = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """What a build tells while it works.

    Parameters
    ----------
    stage : {"pilot", "tasks", "finalise"}
    teacher : str
        The stored teacher the last step was about.
    done_rows, total_rows : int
        Rows of all stored teachers that are published, and that there are.
    """

    stage: Literal["pilot", "tasks", "finalise"]
    teacher: str
    done_rows: int
    total_rows: int


def build_cache(
    address: Address,
    transfer_set: TransferSet,
    teachers: Teachers,
    *,
    codec: CodecSpec | None = None,
    num_classes: int | None = None,
    merge: Merge = None,
    weights: Sequence[float] | None = None,
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
    batch_size: int | None = None,
    num_pilot_rows: int | None = None,
    device: str = "auto",
    autocast: Autocast = None,
    num_workers: int = 0,
    executor: ExecutorSpec | Executor | None = None,
    add_teachers: bool = False,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> SoftTargetCache:
    """Build a cache, or go on with one that was stopped.

    Running the same call again after any stop finishes the cache; its stored data are those of an undisturbed build
    wherever the teachers' arithmetic repeats. A finished cache is opened and nothing is run.

    Parameters
    ----------
    address : str or path
        Where the cache stands.
    transfer_set : TransferSet
        The examples.
    teachers : mapping of name to nn.Module, or sequence of Teacher
        The ensemble, in order.
    codec : Lossless or Codes, default Codes()
        How logits are stored.
    num_classes : int, optional
        Classes; what the first teacher gives where absent.
    merge : "geometric", optional
        Store the members' mean logits only: the smallest cache, for the geometric mean alone.
    weights : sequence of float [teacher], optional
        Of a merged mean; equal where absent.
    shard_rows, chunk_rows : int, optional
        Rows of a stored object and of a unit read; chosen from the row's size where absent.
    batch_size : int, optional
        Examples a teacher sees at once, 256 where absent. Independent of shards; part of the plan.
    num_pilot_rows : int, optional
        Rows on which the codec is fitted, 2,048 where absent.
    device : str
        Where teachers given as modules run; `auto` takes cuda where there is one.
    autocast : {"bfloat16", "float16"}, optional
        Reduced precision of teachers given as modules.
    num_workers : int
        Processes that load examples; 0 loads on one thread.
    executor : executor spec, optional
        Where tasks run; this process where absent.
    add_teachers : bool
        Allow teachers that the standing cache does not have yet to be added to it.
    on_progress : callable (BuildProgress), optional
        Called as shards are published.

    Returns
    -------
    SoftTargetCache
        The finished cache, open.

    Raises
    ------
    PlanMismatchError
        The address holds a cache planned otherwise; both sides are printed.
    NonFiniteLogitsError, WrongClassCountError, CodecError
        A teacher's logits cannot be cached; the message names teacher and example.
    DuplicateExampleError, TransferSetError, InputMismatchError
        The transfer set is malformed, or gives other inputs than before.
    CorruptCacheError
        A published shard no longer matches its record.

    Examples
    --------
    >>> import tempfile, torch, kdcache
    >>> net = torch.nn.Linear(4, 3)
    >>> examples = kdcache.TransferSet.from_arrays(torch.randn(10, 4), labels=[0, 1] * 5)
    >>> folder = tempfile.mkdtemp()
    >>> cache = kdcache.build_cache(f"{folder}/cache", examples, {"a": net})
    >>> cache.read([7]).probabilities(temperature=4.0).shape
    torch.Size([1, 3])
    """
    draft = _draft(
        address, transfer_set, teachers, codec=codec, num_classes=num_classes, merge=merge, weights=weights,
        shard_rows=shard_rows, chunk_rows=chunk_rows, batch_size=batch_size, num_pilot_rows=num_pilot_rows,
        device=device, autocast=autocast, num_workers=num_workers, add_teachers=add_teachers,
    )  # fmt: skip
    chosen = open_executor(executor or InProcess())
    report = on_progress or (lambda _: None)
    if not draft.is_complete:
        _carry_out(draft, chosen, report)
    return open_cache(address)


def plan_cache(
    address: Address,
    transfer_set: TransferSet,
    teachers: Teachers,
    **options: Any,
) -> Forecast:
    """Plan a build and run its pilot, without writing anything.

    Parameters
    ----------
    address, transfer_set, teachers, **options
        As of `build_cache`.

    Returns
    -------
    Forecast
        The plan, and for each stored teacher the forecast bytes, fidelity and time.

    Raises
    ------
    KdcacheError
        Whatever would stop the build at its start.
    """
    draft = _draft(address, transfer_set, teachers, **options)
    pilots = [_pilot(draft, stored) for stored in draft.work.teachers]
    return Forecast(str(address), draft.plan, tuple(pilot.forecast for pilot in pilots))


@dataclass(frozen=True, eq=False)
class _Draft:
    """A build that is about to start: nothing has been written."""

    store: CacheStore
    plan_index: int
    work: Work
    is_complete: bool

    @property
    def plan(self) -> PlanDocument:
        return self.work.plan


def _draft(
    address: Address,
    transfer_set: TransferSet,
    teachers: Teachers,
    *,
    codec: CodecSpec | None = None,
    num_classes: int | None = None,
    merge: Merge = None,
    weights: Sequence[float] | None = None,
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
    batch_size: int | None = None,
    num_pilot_rows: int | None = None,
    device: str = "auto",
    autocast: Autocast = None,
    num_workers: int = 0,
    add_teachers: bool = False,
) -> _Draft:
    members = _as_teachers(teachers, device=device, autocast=autocast)
    store = CacheStore.at(address)
    plans = store.plans()
    if not plans and any(True for _ in store.objects.list("")):
        raise CacheExistsError(
            f"{store.address} holds files that are no kdcache cache; nothing was written. Choose an empty folder"
        )
    fingerprints = tuple(member.fingerprint for member in members)
    if num_classes is None:
        standing_classes = plans[-1].cache.num_classes if plans else None
        num_classes = standing_classes or _probe_classes(members[0], transfer_set)
    proposed = make_plan(
        transfer_set, fingerprints, codec=codec or Codes(), num_classes=num_classes, merge=merge,
        weights=_normalised(weights, len(members)) if merge else None, shard_rows=shard_rows, chunk_rows=chunk_rows,
        batch_size=batch_size, num_pilot_rows=num_pilot_rows,
    )  # fmt: skip
    plan, plan_index = _choose_plan(plans, proposed, add_teachers=add_teachers)
    folders = dict.fromkeys(str(member.folder) for member in members if isinstance(member, SourcedTeacher))
    work = Work(
        store.address, plan, transfer_set, _stored_teachers(plan, members), num_workers, (*folders, str(Path.cwd()))
    )
    complete = store.complete()
    return _Draft(store, plan_index, work, complete is not None and complete.plan_digest == plan.digest())


def _carry_out(draft: _Draft, executor: Executor, report: Callable[[BuildProgress], None]) -> None:
    _publish_plan(draft, report)
    names = [stored.name for stored in draft.work.teachers]
    cache = draft.plan.cache
    tasks = {name: remaining_shards(draft.store, cache, name) for name in names}
    total = cache.num_rows * cache.num_views * len(names)
    done = total - sum(cache.rows_in_shard(shard) for shards in tasks.values() for shard in shards)
    report(BuildProgress("tasks", names[0], done, total))

    def on_record(record: Record) -> None:
        nonlocal done
        done += record.num_rows
        report(BuildProgress("tasks", record.teacher, done, total))

    executor.run(draft.work, tasks, on_record)
    finalise(draft.store, draft.plan_index, draft.plan, _stored_names(draft.plan))
    report(BuildProgress("finalise", names[-1], done, total))


def _publish_plan(draft: _Draft, report: Callable[[BuildProgress], None]) -> None:
    """Run the pilots that are missing, then write plan, root, examples, index and teachers, in this order.

    All pilots run before the first write, so that a teacher that cannot be cached leaves nothing behind.
    """
    total = draft.plan.cache.num_rows * draft.plan.cache.num_views * len(draft.work.teachers)
    pilots = {}
    for stored in draft.work.teachers:
        if draft.store.teacher(stored.name) is None:
            report(BuildProgress("pilot", stored.name, 0, total))
            pilots[stored.name] = _pilot(draft, stored)
            draft.work.pilot[stored.name] = pilots[stored.name].kept
    store, plan = draft.store, draft.plan
    if not store.publish_plan(draft.plan_index, plan):
        refuse_other_plan(store.plans()[draft.plan_index], plan)
    store.write_root(plan.cache)
    transfer_set = draft.work.transfer_set
    table = ExampleTable(
        example_ids=transfer_set.example_ids,
        first_row=draft.work.row_map.first_row[:-1],
        num_rows=transfer_set.num_rows,
        labels=transfer_set.labels,
        input_digests=transfer_set.input_digests,
    )
    store.write_examples(table)
    store.write_index(table)
    for stored in draft.work.teachers:
        _publish_teacher(draft, stored, pilots.get(stored.name))


def _publish_teacher(draft: _Draft, stored: StoredTeacher, pilot: Pilot | None) -> None:
    if pilot is None:
        return
    codec = codec_for(draft.plan.codec, draft.plan.cache.num_classes)
    document = TeacherDocument.make(
        name=stored.name,
        members=stored.members,
        weights=draft.plan.weights,
        num_classes=codec.num_classes,
        codec=draft.plan.codec,
        num_columns=codec.num_columns,
        storage_dtype=codec.storage_dtype,
        parameters={},  # described by the store, from the arrays
        num_pilot_rows=pilot.forecast.num_pilot_rows,
    )
    draft.store.publish_teacher(document, pilot.parameters)


def _pilot(draft: _Draft, stored: StoredTeacher) -> Pilot:
    return run_pilot(stored, draft.work.inputs)


def _choose_plan(
    plans: Sequence[PlanDocument], proposed: PlanDocument, *, add_teachers: bool
) -> tuple[PlanDocument, int]:
    if not plans:
        return proposed, 0
    standing = plans[-1]
    if not add_teachers:
        refuse_other_plan(standing, proposed)
        return standing, len(plans) - 1
    extended = extend_plan(standing, proposed)
    return extended, len(plans) - 1 if extended == standing else len(plans)


def _stored_teachers(plan: PlanDocument, members: Sequence[Teacher]) -> tuple[StoredTeacher, ...]:
    if plan.cache.merge is None:
        return tuple(StoredTeacher(member.fingerprint.name, member, (member.fingerprint,)) for member in members)
    weights = plan.weights or tuple(1 / len(members) for _ in members)
    merged = MergedTeacher(tuple(members), weights)
    return (StoredTeacher(MERGED_NAME, merged, tuple(member.fingerprint for member in members)),)


def _stored_names(plan: PlanDocument) -> list[str]:
    return [teacher.name for teacher in plan.teachers] if plan.cache.merge is None else [MERGED_NAME]


def _as_teachers(teachers: Teachers, *, device: str, autocast: Autocast) -> tuple[Teacher, ...]:
    if not isinstance(teachers, Mapping):
        members = tuple(teachers)
    else:
        members = tuple(
            ModuleTeacher(name, value, device, autocast) if isinstance(value, nn.Module) else value
            for name, value in teachers.items()
        )
    if not members:
        raise JobError("no teachers were given; a cache needs at least one. Nothing was written")
    for member in members:
        if not isinstance(member, Teacher):
            raise JobError(
                f"a teacher is a {type(member).__qualname__}; give torch modules by name, or objects with "
                "`fingerprint` and `running()`. Nothing was written"
            )
    return members


def _normalised(weights: Sequence[float] | None, count: int) -> tuple[float, ...] | None:
    if weights is None:
        return None
    total = math.fsum(weights)
    if len(weights) != count or min(weights) < 0 or not math.isfinite(total) or total <= 0:
        raise JobError(
            f"weights {list(weights)} do not fit {count} teachers: give one number of at least 0 each, not all 0. "
            "Nothing was written"
        )
    return tuple(weight / total for weight in weights)


def _probe_classes(teacher: Teacher, transfer_set: TransferSet) -> int:
    """Run a teacher on one example to learn how many classes it has."""
    fingerprint = teacher.fingerprint
    plan = _probe_plan(transfer_set, fingerprint)
    inputs = Inputs(transfer_set, RowMap(plan, transfer_set.num_rows))
    with teacher.running() as run:
        batches = BatchLogits(fingerprint.name, run, inputs, num_classes=None)
        logits = next(batches.stream([BatchKey(0, 0)]))
    return int(logits.shape[1])


def _probe_plan(transfer_set: TransferSet, fingerprint: Fingerprint) -> PlanDocument:
    return make_plan(transfer_set, [fingerprint], codec=Codes(), num_classes=1, batch_size=1, num_pilot_rows=1)
