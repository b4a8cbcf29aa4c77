"""Training all students of a job from its cache; the teachers of the job are never imported."""

from __future__ import annotations

__all__ = ["train_job"]

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import SoftTargetCache, open_cache
from kdcache.documents import StudentSweep
from kdcache.errors import IncompleteCacheError, JobError, MergedCacheError
from kdcache.jobs import LoadedJob, accepts, resolve
from kdcache.stream import SoftTargetLoader
from kdcache.students.correction import BiasCorrection
from kdcache.students.evaluation import Evaluation, as_evaluation
from kdcache.students.lineup import line_up
from kdcache.students.results import StudentResult
from kdcache.students.sweep import Progress, train_sweep
from kdcache.transfer_set import TransferSet


def train_job(
    loaded: LoadedJob,
    *,
    out: str | Path,
    only: Collection[str] | None = None,
    device: str = "auto",
    checkpoint_epochs: int = 1,
    resume: bool = True,
    progress: Progress = lambda _done, _total, _text: None,
) -> list[StudentResult]:
    """Train the students of a job from its cache.

    Every sweep reads the cache once an epoch for all its students. The job's teachers are neither imported nor run.
    A subset's factory is given ``transfer_set=`` where it takes that argument, and returns example ids.

    Parameters
    ----------
    loaded : LoadedJob
        As `kdcache.jobs.read_job` gives it.
    out : str or Path
        Takes ``students/SWEEP/`` with metrics.jsonl, results.json and one safetensors file a student.
    only : collection of str, optional
        Names of the sweeps to train; all where absent.
    device : str
        ``auto`` takes cuda where there is one.
    checkpoint_epochs : int
        Epochs from one checkpoint to the next.
    resume : bool
        Go on with stopped sweeps and keep finished ones; False trains the chosen sweeps anew, overwriting them.
    progress : callable (batches done, batches in all, text)
        Called after every batch; counts run over all chosen sweeps.

    Returns
    -------
    list of StudentResult
        Sweep by sweep in the job's order, each in the order of `line_up`.

    Raises
    ------
    JobError
        An import string, an argument or a combination of options is wrong; or `out` holds a run of another job, with
        another cache or transfer set.
    CacheNotFoundError, IncompleteCacheError
        There is no finished cache at the job's address.
    UnknownExampleError, InputMismatchError
        The transfer set is not the one that was cached.
    MergedCacheError
        A sweep asks for a mean that the cache cannot give.
    """
    sweeps = _chosen(loaded, only)
    if not sweeps:
        raise JobError(
            "the job has no [[students]], so there is nothing to train; nothing was written. Add a sweep to it"
        )
    cache = open_cache(loaded.cache_address)
    _check_teachers(loaded, cache)
    transfer_set = _transfer_set(loaded)
    for sweep in sweeps:
        _check(sweep, cache, transfer_set)
    evaluation = None if loaded.job.evaluation is None else as_evaluation(loaded.make(loaded.job.evaluation))
    subsets = [_subset(loaded, sweep, transfer_set) for sweep in sweeps]
    counts = [_num_batches(sweep, subset, transfer_set) for sweep, subset in zip(sweeps, subsets, strict=True)]
    results = []
    for index, (sweep, subset) in enumerate(zip(sweeps, subsets, strict=True)):
        results += _train(
            loaded,
            sweep,
            cache=cache,
            transfer_set=transfer_set,
            subset=subset,
            evaluation=evaluation,
            out=Path(out),
            options={"device": device, "checkpoint_epochs": checkpoint_epochs, "resume": resume},
            progress=_within(progress, sum(counts[:index]), sum(counts)),
        )
    return results


def _train(
    loaded: LoadedJob,
    sweep: StudentSweep,
    *,
    cache: SoftTargetCache,
    transfer_set: TransferSet,
    subset: Sequence[Any] | None,
    evaluation: Evaluation | None,
    out: Path,
    options: dict[str, Any],
    progress: Progress,
) -> list[StudentResult]:
    correction = None
    if sweep.bias_correction:
        correction = BiasCorrection.of(transfer_set, num_classes=cache.num_classes, trained_on=subset)
    return train_sweep(
        sweep,
        make_student=lambda: loaded.make(sweep),
        loader=SoftTargetLoader(cache, transfer_set, batch_size=sweep.batch_size, example_ids=subset),
        folder=out / "students" / sweep.name,
        identity=_identity(loaded, cache, transfer_set, subset),
        evaluation=evaluation,
        correction=correction,
        progress=progress,
        **options,
    )


def _within(progress: Progress, before: int, total: int) -> Progress:
    """Count one sweep's batches as part of all."""

    def report(done: int, _: int, text: str) -> None:
        progress(before + done, total, text)

    return report


def _chosen(loaded: LoadedJob, only: Collection[str] | None) -> list[StudentSweep]:
    sweeps = loaded.job.students
    names = [sweep.name for sweep in sweeps]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise JobError(f"job {loaded.job.name!r} has no student sweep {unknown}; it has {names}")
    return [sweep for sweep in sweeps if only is None or sweep.name in only]


def _transfer_set(loaded: LoadedJob) -> TransferSet:
    transfer_set = loaded.make(loaded.job.transfer_set)
    if not isinstance(transfer_set, TransferSet):
        raise JobError(
            f"{loaded.job.transfer_set.factory!r} gave a {type(transfer_set).__qualname__}; a transfer set's factory "
            "returns a kdcache.TransferSet"
        )
    return transfer_set


def _check_teachers(loaded: LoadedJob, cache: SoftTargetCache) -> None:
    """Refuse a cache without some of the teachers that the job names; their code is not looked at."""
    named = [teacher.name for teacher in loaded.job.teachers]
    held = [member.name for document in cache.teachers.values() for member in document.members]
    missing = [name for name in named if name not in held]
    if missing:
        raise JobError(
            f"job {loaded.job.name!r} names the teachers {missing}, which cache {cache.address} does not hold: it has "
            f"{held}. Nothing was trained. Build them into it first (`kdcache build JOB --add-teachers`), or take them "
            "out of the job"
        )


def _check(sweep: StudentSweep, cache: SoftTargetCache, transfer_set: TransferSet) -> None:
    """Refuse before training what would fail during it."""
    if cache.document.merge is not None and sweep.mean != "geometric":
        raise MergedCacheError(
            f"sweep {sweep.name!r} asks for mean={sweep.mean!r}, and cache {cache.address} keeps the geometric mean "
            "only; give mean='geometric', or build a cache without merge"
        )
    needs_labels = sweep.bias_correction or any(student.soft_weight < 1 for student in line_up(sweep))
    if needs_labels and transfer_set.labels is None:
        raise JobError(
            f"sweep {sweep.name!r} needs labels (a soft weight below 1, or bias_correction), and the transfer set has "
            "none; give soft_weights = [1.0] and no bias_correction, or a transfer set with labels"
        )


def _subset(loaded: LoadedJob, sweep: StudentSweep, transfer_set: TransferSet) -> Sequence[Any] | None:
    if sweep.subset is None:
        return None
    factory = resolve(sweep.subset.factory, loaded.folder)
    extra = {"transfer_set": transfer_set} if accepts(factory, "transfer_set") else {}
    ids = loaded.make(sweep.subset, **extra)
    listed = ids.tolist() if isinstance(ids, np.ndarray | torch.Tensor) else list(ids)
    if not listed:
        raise JobError(f"sweep {sweep.name!r}: subset {sweep.subset.factory!r} gave no example ids; expected some")
    return listed


def _num_batches(sweep: StudentSweep, subset: Sequence[Any] | None, transfer_set: TransferSet) -> int:
    num_examples = len(transfer_set) if subset is None else len(subset)
    return sweep.epochs * -(-num_examples // sweep.batch_size)


def _identity(
    loaded: LoadedJob, cache: SoftTargetCache, transfer_set: TransferSet, subset: Sequence[Any] | None
) -> dict[str, Any]:
    """Give what decides a sweep's result besides its own document."""
    if cache.complete is None:
        raise IncompleteCacheError(f"cache {cache.address} is not complete; run its build again to finish it")
    evaluation = loaded.job.evaluation
    return {
        "cache": {"data_digest": cache.complete.data_digest, "teachers": list(cache.teacher_names)},
        "transfer_set": {"digest": cache.document.transfer_set_digest, "num_examples": len(transfer_set)},
        "trained_on": {"digest": _digest(subset), "num_examples": len(transfer_set if subset is None else subset)},
        "evaluation": None if evaluation is None else evaluation.to_mapping(),
    }


def _digest(subset: Sequence[Any] | None) -> str | None:
    return None if subset is None else hashlib.sha256(json.dumps(subset).encode()).hexdigest()
