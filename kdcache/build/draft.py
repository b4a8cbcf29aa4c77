"""Drafts: a build that is about to start, checked against what stands at its address. Nothing has been written."""

from __future__ import annotations

__all__ = ["Address", "Draft", "PlanOptions", "Teachers", "as_codec", "as_teachers", "make_draft", "propose_plan"]

import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from kdcache.build.inference import BatchLogits, Inputs
from kdcache.build.plan import Merge, extend_plan, make_plan, refuse_other_plan
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.teachers import Autocast, MergedTeacher, ModuleTeacher, SourcedTeacher, Teacher
from kdcache.build.work import StoredTeacher, Work
from kdcache.documents import (
    GIVEN,
    MERGED_NAME,
    Codes,
    Document,
    Fingerprint,
    Lossless,
    PlanDocument,
    PlannedCodec,
    RateTarget,
    Spectral,
    TopK,
)
from kdcache.errors import CacheExistsError, JobError, OptionError, TransferSetError
from kdcache.store import CacheStore, layout
from kdcache.transfer_set import TransferSet

Teachers = Mapping[str, nn.Module | Teacher] | Sequence[Teacher]
Address = str | os.PathLike[str]
SPECS: tuple[type[Document], ...] = (Codes, Lossless, Spectral, TopK, RateTarget)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How a cache is planned and its teachers are run; see `build_cache` for each."""

    codec: PlannedCodec | None = None
    max_kl: float | None = None
    bytes_per_row: float | None = None
    num_classes: int | None = None
    merge: Merge = None
    weights: Sequence[float] | None = None
    shard_rows: int | None = None
    chunk_rows: int | None = None
    batch_size: int | None = None
    num_pilot_rows: int | None = None
    device: str = "auto"
    autocast: Autocast = None
    num_workers: int = 0
    add_teachers: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", as_codec(self.codec))
        given = [name for name in ("codec", "max_kl", "bytes_per_row") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} exclude each other: give one of them. Nothing was written")
        if self.max_kl is not None or self.bytes_per_row is not None:
            target = RateTarget.make(
                max_kl=_as_float("max_kl", self.max_kl), bytes_per_row=_as_float("bytes_per_row", self.bytes_per_row)
            )
            object.__setattr__(self, "codec", target)
            object.__setattr__(self, "max_kl", None)
            object.__setattr__(self, "bytes_per_row", None)
        for name in ("num_classes", "shard_rows", "chunk_rows", "batch_size", "num_pilot_rows", "num_workers"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _as_count(name, value, least=0 if name == "num_workers" else 1))


@dataclass(frozen=True, eq=False)
class Draft:
    """A build that is about to start.

    Parameters
    ----------
    store : CacheStore
    plan_index : int
        The plan's number, that of the standing plan where it is the same.
    work : Work
    is_complete : bool
        Whether this plan's cache is finished already.
    """

    store: CacheStore
    plan_index: int
    work: Work
    is_complete: bool

    @property
    def plan(self) -> PlanDocument:
        """The plan."""
        return self.work.plan


def make_draft(address: Address, transfer_set: TransferSet, teachers: Teachers, options: PlanOptions) -> Draft:
    """Plan a build and hold it against what stands at the address.

    Raises
    ------
    PlanMismatchError
        The address holds a cache planned otherwise.
    CacheExistsError
        The address holds something that is no cache.
    """
    if not isinstance(transfer_set, TransferSet):
        raise TransferSetError(
            f"the transfer set is a {type(transfer_set).__qualname__}; wrap it: kdcache.TransferSet(dataset, "
            "example_ids=...), .from_arrays(...) or .from_table(...). Nothing was written"
        )
    members = as_teachers(teachers, device=options.device, autocast=options.autocast)
    store = CacheStore.at(address)
    if "://" not in store.address and Path(store.address).is_file():
        raise CacheExistsError(f"{address} is a file; a cache is a folder. Nothing was written; give another address")
    is_occupied = not store.objects.is_empty()  # looked at before another builder's plan can come between
    plans = store.plans()
    if is_occupied and not plans:
        if store.objects.size(layout.ROOT) is not None:
            raise CacheExistsError(
                f"{store.address} holds a cache whose plan is lost; nothing was written. `kdcache repair JOB`, with "
                "this job file, or repair_cache with these teachers, writes the plan anew if complete.json names the "
                "very one. Where complete.json is lost, too, nothing tells what the cache was planned as: build at a "
                "new address"
            )
        raise CacheExistsError(
            f"{store.address} holds files that are no kdcache cache; nothing was written. Choose an empty folder"
        )
    proposed = propose_plan(transfer_set, members, plans, options)
    plan, plan_index = _choose_plan(plans, proposed, add_teachers=options.add_teachers)
    folders = dict.fromkeys(str(member.folder) for member in members if isinstance(member, SourcedTeacher))
    work = Work(
        store.address if "://" in store.address else str(Path(store.address).absolute()),
        plan,
        transfer_set,
        _stored_teachers(plan, members),
        options.num_workers,
        (*folders, str(Path.cwd())),
    )
    return Draft(store, plan_index, work, _is_complete(store, plan))


def _is_complete(store: CacheStore, plan: PlanDocument) -> bool:
    """Tell whether a plan's cache was finished, and none of its files was taken out since to be built anew."""
    complete = store.complete()
    if complete is None or complete.plan_digest != plan.digest():
        return False
    standing = set(store.objects.list(""))
    expected = {layout.EXAMPLES}
    for name in plan.stored_names:
        expected.update(layout.record_key(name, shard) for shard in range(plan.cache.num_shards))
        expected.update(layout.shard_key(name, shard) for shard in range(plan.cache.num_shards))
    return expected <= standing and store.index_digest() == complete.index_digest


def as_codec(value: Any) -> PlannedCodec | None:
    """Give a codec spec; a mapping is read as a job file's `codec` table is."""
    if value is None or isinstance(value, SPECS):
        return cast("PlannedCodec | None", value)
    kinds = {str(kind.model_fields["kind"].default): kind for kind in SPECS if kind is not RateTarget}
    if isinstance(value, Mapping) and value.get("kind") in kinds:
        return cast("PlannedCodec", kinds[value["kind"]].from_mapping(value, source=GIVEN))
    names = ", ".join(f"kdcache.{kind.__name__}(...)" for kind in SPECS)
    tables = ", ".join(repr({"kind": kind}) for kind in kinds)
    raise OptionError(
        f"codec is {value!r}; give {names}, or a mapping as in a job file ({tables}, with further options), or "
        "max_kl=, or bytes_per_row=. Nothing was written"
    )


def _as_float(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | bool) or not hasattr(value, "__float__"):
        raise OptionError(f"{name} is {value!r}; expected a number. Nothing was written")
    return float(value)


def _as_count(name: str, value: int, *, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError as error:
        raise OptionError(f"{name} is {value!r}; expected a whole number. Nothing was written") from error
    if isinstance(value, bool) or count < least:
        raise OptionError(f"{name} is {value!r}; expected a whole number of at least {least}. Nothing was written")
    return count


def propose_plan(
    transfer_set: TransferSet, members: Sequence[Teacher], plans: Sequence[PlanDocument], options: PlanOptions
) -> PlanDocument:
    """Plan what is asked for; what is left out is as in the standing plan, where there is one.

    Raises
    ------
    DocumentError, TransferSetError
        The options contradict each other, or the transfer set is malformed.
    """
    keeps_chunk_rows = options.chunk_rows is not None
    if plans:
        keeps_chunk_rows |= plans[-1].keeps_chunk_rows is not None
        options = _filled_in(options, plans[-1])
    return make_plan(
        transfer_set,
        [member.fingerprint for member in members],
        codec=options.codec or Codes(),
        num_classes=options.num_classes or _probe_classes(members[0], transfer_set),
        merge=options.merge,
        weights=_normalised(options.weights, len(members)),
        shard_rows=options.shard_rows,
        chunk_rows=options.chunk_rows,
        batch_size=options.batch_size,
        num_pilot_rows=options.num_pilot_rows,
        keeps_chunk_rows=keeps_chunk_rows,
    )


def _filled_in(options: PlanOptions, standing: PlanDocument) -> PlanOptions:
    defaults = {
        "codec": standing.codec,
        "num_classes": standing.cache.num_classes,
        "shard_rows": standing.cache.shard_rows,
        "chunk_rows": standing.cache.chunk_rows,
        "batch_size": standing.batch_size,
        "num_pilot_rows": standing.num_pilot_rows,
    }
    missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


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


def as_teachers(teachers: Teachers, *, device: str, autocast: Autocast) -> tuple[Teacher, ...]:
    """Give teachers that run, in order.

    Raises
    ------
    JobError
        There is none, or one is neither a module nor a teacher, or has another name than the one it is given under.
    """
    if isinstance(teachers, nn.Module) or callable(getattr(teachers, "running", None)):
        raise JobError(
            f"teachers is one {type(teachers).__qualname__}; give it under a name: teachers={{'name': module}}. "
            "Nothing was written"
        )
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
        # isinstance(member, Teacher) would ask for the fingerprint, and hide an AttributeError in a user's factory
        if not callable(getattr(member, "running", None)):
            raise JobError(
                f"a teacher is a {type(member).__qualname__}; give torch modules by name, or objects with "
                "`fingerprint` and `running()`. Nothing was written"
            )
    for name, member in zip(teachers, members, strict=True) if isinstance(teachers, Mapping) else ():
        if member.fingerprint.name != name:
            raise JobError(
                f"the teacher given as {name!r} calls itself {member.fingerprint.name!r}; give it under its own name. "
                "Nothing was written"
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
