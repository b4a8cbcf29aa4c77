"""Building a cache: plan, pilot, tasks, finalise. Safe to stop at any moment and to run again."""

from __future__ import annotations

__all__ = ["BuildProgress", "build_cache", "example_table", "plan_cache"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdcache.build.draft import Address, Draft, PlanOptions, Teachers, as_codec, make_draft
from kdcache.build.executors import Executor, open_executor
from kdcache.build.finalise import finalise
from kdcache.build.memory import TaskMemory
from kdcache.build.pilot import Forecast, Pilot
from kdcache.build.plan import Merge, chunk_rows_of, refuse_other_plan
from kdcache.build.task import remaining_shards
from kdcache.build.teachers import Autocast
from kdcache.build.work import StoredTeacher
from kdcache.cache import SoftTargetCache, open_cache
from kdcache.documents import ExecutorSpec, InProcess, PlannedCodec, Record, TeacherDocument
from kdcache.errors import CorruptCacheError
from kdcache.store import ExampleTable
from kdcache.transfer_set import TransferSet
from kdcache.verify.planned import contradictions, is_begun


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
    task_memory : TaskMemory, optional
        What a task takes at its peak, of the teacher that takes most: told as tasks begin, where a pilot has run.
    """

    stage: Literal["pilot", "tasks", "finalise"]
    teacher: str
    done_rows: int
    total_rows: int
    task_memory: TaskMemory | None = None


def build_cache(
    address: Address,
    transfer_set: TransferSet,
    teachers: Teachers,
    *,
    codec: PlannedCodec | Mapping[str, Any] | None = None,
    max_kl: float | None = None,
    bytes_per_row: float | None = None,
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
    codec : Lossless, Codes, Spectral or TopK, default Codes()
        How logits are stored; or a mapping, as a job file's `codec`.
    max_kl : float, optional
        In place of a codec: the smallest cache whose mean KL, in nats, is at most this at temperatures 1, 2 and 4.
        Above 0 and at most 1.
    bytes_per_row : float, optional
        In place of a codec: the most faithful cache of at most so many bytes a row and teacher, compressed codes and
        parameters; ids and documents come on top.
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
        Rows on which the codec is fitted; 2,048, or up to 4,096 for a basis, where absent.
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
    TeacherError
        A teacher failed, or gives probabilities in place of logits.
    DocumentError, OptionError
        An option cannot be.
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
    options = PlanOptions(
        codec=as_codec(codec), max_kl=max_kl, bytes_per_row=bytes_per_row, num_classes=num_classes,
        merge=merge, weights=weights, shard_rows=shard_rows,
        chunk_rows=chunk_rows, batch_size=batch_size, num_pilot_rows=num_pilot_rows, device=device,
        autocast=autocast, num_workers=num_workers, add_teachers=add_teachers,
    )  # fmt: skip
    draft = make_draft(address, transfer_set, teachers, options)
    if not draft.is_complete:
        with open_executor(executor or InProcess()) as opened:
            _carry_out(draft, opened, on_progress or (lambda _: None))
    return open_cache(address)


def plan_cache(
    address: Address,
    transfer_set: TransferSet,
    teachers: Teachers,
    *,
    executor: ExecutorSpec | Executor | None = None,
    **options: Any,
) -> Forecast:
    """Plan a build and run its pilot, without writing anything.

    Parameters
    ----------
    address, transfer_set, teachers, executor, **options
        As of `build_cache`.

    Returns
    -------
    Forecast
        The plan, and for each stored teacher the forecast bytes, fidelity and time; where a basis was fitted, also
        what other steps of it cost and keep.

    Raises
    ------
    KdcacheError
        Whatever would stop the build at its start.
    """
    draft = make_draft(address, transfer_set, teachers, PlanOptions(**options))
    with open_executor(executor or InProcess()) as opened:
        pilots = [opened.pilot(draft.work, stored.name, with_curve=True) for stored in draft.work.teachers]
    return Forecast(str(address), draft.plan, tuple(pilot.forecast for pilot in pilots))


def _carry_out(draft: Draft, executor: Executor, report: Callable[[BuildProgress], None]) -> None:
    memory = _publish_plan(draft, executor, report)
    names = [stored.name for stored in draft.work.teachers]
    cache = draft.plan.cache
    tasks = {name: remaining_shards(draft.store, cache, name) for name in names}
    total = cache.num_rows * cache.num_views * len(names)
    done = total - sum(cache.rows_in_shard(shard) for shards in tasks.values() for shard in shards)
    report(BuildProgress("tasks", names[0], done, total, memory))

    def on_record(record: Record) -> None:
        nonlocal done
        done += record.num_rows
        report(BuildProgress("tasks", record.teacher, done, total))

    executor.run(draft.work, tasks, on_record)
    finalise(draft.store, draft.plan_index, draft.plan)
    report(BuildProgress("finalise", names[-1], done, total))


def _publish_plan(draft: Draft, executor: Executor, report: Callable[[BuildProgress], None]) -> TaskMemory | None:
    """Run the pilots that are missing, then write plan, root, examples, index and teachers, in this order.

    Gives what a task takes, where a pilot has run.

    All pilots run before the first write, so that a teacher that cannot be cached leaves nothing behind.
    """
    total = draft.plan.cache.num_rows * draft.plan.cache.num_views * len(draft.work.teachers)
    pilots = {}
    for stored in draft.work.teachers:
        standing = draft.store.teacher(stored.name)
        if standing is not None:
            _refuse_unplanned(draft, standing)
        else:
            report(BuildProgress("pilot", stored.name, 0, total))
            pilots[stored.name] = executor.pilot(draft.work, stored.name)
    store, plan = draft.store, draft.plan
    if not store.publish_plan(draft.plan_index, plan):
        refuse_other_plan(store.plans()[draft.plan_index], plan)
    store.write_root(plan.cache)
    table = example_table(draft.work.transfer_set)
    store.write_examples(table)
    store.write_index(table)
    for stored in draft.work.teachers:
        _publish_teacher(draft, stored, pilots.get(stored.name))
    stated = [pilot.forecast.memory for pilot in pilots.values() if pilot.forecast.memory is not None]
    return max(stated, key=lambda memory: memory.task_bytes, default=None)


def _refuse_unplanned(draft: Draft, document: TeacherDocument) -> None:
    """Refuse a document that was altered before its first shard was built; from then on records name it."""
    told = contradictions(draft.plan, document)
    if told and not is_begun(draft.store, document.name):
        address = draft.store.address
        raise CorruptCacheError(
            f"cache {address}: the document of teacher {document.name!r} is not of the plan: {'; '.join(told)}. "
            f"Nothing was changed. Run `kdcache repair {address}`, which takes it away, and then the same command again"
        )


def example_table(transfer_set: TransferSet) -> ExampleTable:
    """Make the table of a transfer set's examples that a cache keeps."""
    return ExampleTable.make(
        transfer_set.example_ids,
        num_rows=transfer_set.num_rows,
        labels=transfer_set.labels,
        input_digests=transfer_set.input_digests,
    )


def _publish_teacher(draft: Draft, stored: StoredTeacher, pilot: Pilot | None) -> None:
    standing = draft.store.teacher(stored.name)
    if standing is not None:  # written by a build that may have stopped before it wrote the array's metadata
        draft.store.publish_teacher(standing, draft.store.parameters(standing))
    if pilot is None:
        return
    codec = pilot.codec
    chunk_rows = chunk_rows_of(draft.plan, codec.spec)
    document = TeacherDocument.make(
        name=stored.name,
        members=stored.members,
        weights=draft.plan.weights,
        num_classes=codec.num_classes,
        codec=codec.spec,
        num_columns=codec.num_columns,
        storage_dtype=codec.storage_dtype,
        chunk_rows=None if chunk_rows == draft.plan.cache.chunk_rows else chunk_rows,
        parameters={},  # described by the store, from the arrays
        num_pilot_rows=pilot.forecast.num_pilot_rows,
    )
    draft.store.publish_teacher(document, pilot.parameters)
