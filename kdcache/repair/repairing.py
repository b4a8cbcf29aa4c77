"""`repair_cache`: drop what is bad, write anew what follows from the rest, build what is missing."""

from __future__ import annotations

__all__ = ["repair_cache"]

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcache import jobs
from kdcache.build import BuildProgress
from kdcache.build.draft import Address, Teachers
from kdcache.build.executors import Executor
from kdcache.build.job import job_options
from kdcache.documents import ExecutorSpec
from kdcache.errors import OptionError
from kdcache.jobs import LoadedJob
from kdcache.repair.actions import Action, RepairReport
from kdcache.repair.claim import RepairClaim, claim_repair
from kdcache.repair.mending import Mending
from kdcache.repair.origin import Origin
from kdcache.repair.planning import plan_repair
from kdcache.store import CacheStore, layout
from kdcache.transfer_set import TransferSet
from kdcache.verify import Finding, VerifyReport, verify_cache
from kdcache.verify.standing import Standing


def repair_cache(
    address: Address | None = None,
    transfer_set: TransferSet | None = None,
    teachers: Teachers | None = None,
    *,
    job: str | os.PathLike[str] | LoadedJob | None = None,
    executor: ExecutorSpec | Executor | None = None,
    dry_run: bool = False,
    on_verified: Callable[[int, int], None] | None = None,
    on_progress: Callable[[BuildProgress], None] | None = None,
    **options: Any,
) -> RepairReport:
    """Mend a cache: drop exactly what is bad, write anew what follows from the rest, and build what is missing.

    The cache is verified first, byte by byte. Nothing that is sound is touched, and nothing is dropped that a second
    reading finds right. Without the teachers, what needs them is dropped and named, with the command that builds it;
    with them it is built by the ordinary way. After that the data are those of an undisturbed build wherever the
    teachers' arithmetic repeats; where it does not, records, certificates and complete.json are those of the new
    shards. At no moment does the cache read wrong: see `kdcache.repair.mending` for each step and what a stop leaves.
    Running it again does nothing more. One repair is at work at a time: see `kdcache.repair.claim`.

    Parameters
    ----------
    address : str or path, optional
        The cache; the job's where absent.
    transfer_set : TransferSet, optional
        That of the cache: also the example table can then be made anew.
    teachers : mapping of name to nn.Module, or sequence of Teacher, optional
        All that the cache was planned with, in order; needs the transfer set.
    job : path or LoadedJob, optional
        In place of address, transfer set and teachers.
    executor : executor spec, optional
        Where missing shards are built.
    dry_run : bool
        Say what would be done, and change nothing.
    on_verified : callable (done shards, all shards), optional
    on_progress : callable (BuildProgress), optional
    **options
        Of `build_cache`: what the plan cannot tell, such as `device`, `autocast`, `merge` and `weights`.

    Returns
    -------
    RepairReport

    Raises
    ------
    CacheNotFoundError
        No cache stands there.
    DocumentError, CorruptCacheError
        Neither the root's cache document nor a plan can be read; nothing was changed.
    OptionError
        A job is given together with what it says, or teachers without a transfer set.
    PlanMismatchError
        Transfer set or teachers are not the cache's; nothing was changed.
    StoreError
        Another repair of this cache is at work, and nothing was changed; or the store does not answer, or cannot be
        written to.
    KdcacheError
        Building failed as a build can fail: what is repaired stays, and the same call goes on.

    Examples
    --------
    >>> import pathlib, tempfile, torch, kdcache
    >>> net = torch.nn.Linear(4, 3)
    >>> examples = kdcache.TransferSet.from_arrays(torch.randn(10, 4))
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "cache"
    >>> before = kdcache.build_cache(folder, examples, {"a": net}).complete
    >>> (folder / "teachers/a/codes/c/0/0").unlink()
    >>> kdcache.repair_cache(folder, examples, {"a": net}).is_complete
    True
    >>> kdcache.open_cache(folder).complete == before
    True
    """
    origin, place = _origin(address, transfer_set, teachers, job, executor, options)
    store = CacheStore.at(place)
    Standing.read(store)  # where no cache stands, no claim is written either
    with contextlib.nullcontext() if dry_run else claim_repair(store.objects) as claim:
        found = verify_cache(place, on_progress=on_verified)
        mending = _mending(store, found, origin, claim)
        if origin.has_teachers and found.findings and not any(_is_of_plans(item) for item in found.findings):
            origin.refuse_others()
        actions = list(mending.steps())
        is_blocked = any(action.verb == "cannot" or (action.verb == "build" and action.then) for action in actions)
        is_to_finish = not is_blocked and _is_to_finish(mending)  # complete.json must not vouch for what is damaged
        is_finished = is_to_finish and mending.finish()
    if is_finished:
        actions.append(Action("write", layout.COMPLETE, "it follows from the records"))
    elif is_to_finish:
        actions += _built(mending, on_progress)
    return _report(mending, found, actions)


def _mending(store: CacheStore, found: VerifyReport, origin: Origin, claim: RepairClaim | None) -> Mending:
    standing = Standing.read(store)
    needs_plan = origin.has_teachers and any(_is_of_plans(item) for item in found.findings)
    plan = plan_repair(standing, found.findings, proposed=origin.proposed_plan() if needs_plan else None)
    return Mending(standing, plan, origin, claim)


def _is_of_plans(item: Finding) -> bool:
    return item.key.startswith(f"{layout.PLANS}/")


def _is_to_finish(mending: Mending) -> bool:
    plan, standing = mending.plan, mending.standing
    return plan.rewrites_completion or standing.complete is None or not _is_whole(mending) or _has_other_index(mending)


def _is_whole(mending: Mending) -> bool:
    return mending.standing.store.objects.size(layout.COMPLETE) is not None and not mending.missing_shards()


def _has_other_index(mending: Mending) -> bool:
    """Tell whether the index was made anew with other bytes, as a later release compresses them."""
    complete = mending.standing.complete
    was_made = any(key.startswith(layout.INDEX) for key in mending.plan.write)
    return complete is not None and was_made and mending.standing.store.index_digest() != complete.index_digest


def _built(mending: Mending, on_progress: Callable[[BuildProgress], None] | None) -> list[Action]:
    if not mending.origin.has_teachers or mending.is_dry_run:
        return []
    count = mending.missing_shards()
    mending.origin.build(on_progress)
    return [Action("built", layout.RECORDS, f"{count} shard(s) were missing")]


def _report(mending: Mending, found: VerifyReport, actions: list[Action]) -> RepairReport:
    if mending.is_dry_run:
        findings, is_complete = found.findings, found.is_complete
    else:
        after = verify_cache(found.address, level="quick")
        findings, is_complete = after.findings, after.is_complete
        mending = replace(mending, standing=Standing.read(mending.standing.store))
    missing = mending.missing_shards()
    has_built = any(action.verb == "built" for action in actions)
    is_left = any(action.verb == "build" and action.then for action in actions)
    needs_command = not has_built and (missing > 0 or is_left or not (is_complete or mending.is_dry_run))
    command = mending.origin.command if mending.origin.has_teachers or not is_left else "kdcache repair JOB"
    return RepairReport(
        address=found.address,
        is_dry_run=mending.is_dry_run,
        actions=tuple(actions),
        is_complete=is_complete,
        num_missing_shards=missing,
        command=command if needs_command else None,
        findings=findings,
    )


def _origin(
    address: Address | None,
    transfer_set: TransferSet | None,
    teachers: Teachers | None,
    job: str | os.PathLike[str] | LoadedJob | None,
    executor: ExecutorSpec | Executor | None,
    options: dict[str, Any],
) -> tuple[Origin, Address]:
    """Say what the cache was built from, and where it stands."""
    if job is not None:
        if options or any(given is not None for given in (address, transfer_set, teachers)):
            raise OptionError("a job says address, transfer set, teachers and options: give it alone")
        loaded = job if isinstance(job, LoadedJob) else jobs.read_job(Path(job))
        has_teachers = bool(loaded.job.teachers)
        command = f"kdcache repair {job}" if not isinstance(job, LoadedJob) else "kdcache repair JOB"
        origin = Origin(lambda: job_options(loaded, executor), command, has_teachers, has_teachers)
        return origin, loaded.cache_address
    if address is None:
        raise OptionError("give the cache's address, or its job")
    if teachers is not None and transfer_set is None:
        raise OptionError("teachers are given, and no transfer set to run them on: give transfer_set, too")
    arguments = {"address": address, "transfer_set": transfer_set, "teachers": teachers, "executor": executor}
    has_teachers = teachers is not None
    return Origin(
        lambda: {**arguments, **options}, "kdcache build JOB", has_teachers, transfer_set is not None
    ), address
