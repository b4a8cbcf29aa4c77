"""Comparison with live teachers: rows drawn from a cache, recomputed, and held against what the certificate says.

Rows are computed in the batches that the build computed them in, so that a teacher whose arithmetic repeats gives the
very logits that were encoded. A row therefore costs a whole batch, of `plan.batch_size` examples.
"""

from __future__ import annotations

__all__ = ["Comparison", "TeacherComparison", "compare_job", "compare_with_teachers", "draw_rows"]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.build.draft import Address, PlanOptions, Teachers, make_draft
from kdcache.build.inference import BatchLogits
from kdcache.build.job import job_options
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.work import Work
from kdcache.cache import SoftTargetCache, open_cache
from kdcache.certificate import certificate_of
from kdcache.codecs import Decoder, codec_for, error_range, measure_codes, parameters_to
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.guard import guarded_kl
from kdcache.documents import CacheDocument, CertificateDocument, TeacherDocument
from kdcache.errors import CacheNotFoundError, OptionError
from kdcache.jobs import LoadedJob
from kdcache.store import CacheStore
from kdcache.transfer_set import TransferSet
from kdcache.verify import Finding

TOLERANCE = 0.05
"""Share by which KL may exceed what is certified: other hardware rounds a teacher's logits otherwise."""
SMALLEST_KL = 1e-9
"""KL in nats that is never told as a difference: float32 arithmetic alone makes as much."""


@dataclass(frozen=True)
class TeacherComparison:
    """One stored teacher's drawn rows beside the live teacher's.

    Parameters
    ----------
    name : str
    num_rows : int
        Rows drawn.
    temperatures : tuple of float
    mean_kl, max_kl : tuple of float [temperature]
        KL(live teacher || decoded), in nats, over the drawn rows.
    certified_kl : tuple of float [temperature]
        What no row should exceed: the certificate's bound, or where there is none, the largest KL measured.
    largest_logit_difference : float or None
        Largest difference of a decoded logit from the live one, when each row is shifted to make it least; None where
        what is decoded depends on the temperature.
    """

    name: str
    num_rows: int
    temperatures: tuple[float, ...]
    mean_kl: tuple[float, ...]
    max_kl: tuple[float, ...]
    certified_kl: tuple[float, ...]
    largest_logit_difference: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare_with_teachers` found.

    Parameters
    ----------
    address : str
    seed : int
        With which the rows were drawn: the same seed draws the same rows.
    teachers : tuple of TeacherComparison
    findings : tuple of Finding
        Teachers whose rows exceed what is certified.
    """

    address: str
    seed: int
    teachers: tuple[TeacherComparison, ...]
    findings: tuple[Finding, ...]


def compare_with_teachers(
    address: Address, transfer_set: TransferSet, teachers: Teachers, *, num_rows: int, seed: int = 0, **options: Any
) -> Comparison:
    """Recompute rows of a finished cache with its teachers, and state how far the stored ones are from them.

    Nothing is written. The drawn rows are spread over all shards, and are the same for every teacher.

    Parameters
    ----------
    address : str or path
    transfer_set : TransferSet
        That of the cache.
    teachers : mapping of name to nn.Module, or sequence of Teacher
        All that the cache was planned with, in order.
    num_rows : int
        Rows to draw, at least 1; each may cost a batch of inference.
    seed : int
        Of the drawing, at least 0.
    **options
        Of `build_cache`: what the plan cannot tell, such as `device`, `autocast`, `merge` and `weights`.

    Returns
    -------
    Comparison

    Raises
    ------
    IncompleteCacheError
        The cache's build has not finished.
    OptionError
        `num_rows` is below 1, or `seed` below 0.
    PlanMismatchError
        These are not the cache's teachers or transfer set.
    CorruptCacheError
        A shard is missing, torn or altered.
    """
    if num_rows < 1 or seed < 0:
        raise OptionError(f"num_rows is {num_rows} and seed {seed}; at least 1 row and seed 0 are needed")
    store = CacheStore.at(address)
    if not store.plans():
        raise CacheNotFoundError(f"{store.address} holds no cache and no plan of one. Nothing was written")
    cache = open_cache(address)
    work = make_draft(address, transfer_set, teachers, PlanOptions(**options)).work
    rows = draw_rows(cache.document, num_rows, seed=seed)
    found = tuple(_compared(cache, work, name, rows) for name in cache.teacher_names)
    findings = tuple(finding for teacher in found for finding in _findings(teacher, seed))
    return Comparison(cache.address, seed, found, findings)


def compare_job(loaded: LoadedJob, *, num_rows: int, seed: int = 0) -> Comparison:
    """Compare a job's cache with the job's teachers; see `compare_with_teachers`."""
    options = job_options(loaded)
    options.pop("executor")
    return compare_with_teachers(**options, num_rows=num_rows, seed=seed)


def draw_rows(cache: CacheDocument, num_rows: int, *, seed: int) -> np.ndarray:
    """Draw row numbers, views included, ascending and without duplicates: shards take turns in a random order.

    Returns
    -------
    ndarray [row] of int64
        `num_rows`, or all rows where there are no more.
    """
    generator = np.random.default_rng(seed)
    shards = generator.permutation(cache.num_shards)
    counts = np.array([cache.rows_in_shard(int(shard)) for shard in shards])
    wanted = np.full(len(shards), num_rows // len(shards))
    wanted[: num_rows % len(shards)] += 1
    wanted = np.minimum(wanted, counts)
    short = min(num_rows, int(counts.sum())) - int(wanted.sum())
    for place in np.argsort(wanted - counts, kind="stable"):  # shards that hold more make up for those that hold less
        more = min(short, int(counts[place] - wanted[place]))
        wanted[place], short = wanted[place] + more, short - more
    drawn = [
        shard * cache.shard_rows + generator.choice(count, size=size, replace=False)
        for shard, count, size in zip(shards, counts, wanted, strict=True)
    ]
    return np.sort(np.concatenate(drawn).astype(np.int64))


@torch.inference_mode()
def _compared(cache: SoftTargetCache, work: Work, name: str, rows: np.ndarray) -> TeacherComparison:
    document = cache.teachers[name]
    codes = torch.from_numpy(cache.store.codes_reader(document, cache.document).read_rows(rows))
    decoder = Decoder(
        codec_for(document.codec, document.num_classes), parameters_to(cache.store.parameters(document), "cpu")
    )
    logits = _live_rows(work, document, rows)
    divergences = measure_codes(decoder, logits, codes, TEMPERATURES)
    difference = None
    if not decoder.codec.depends_on_temperature:
        difference = float(error_range(logits, decoder.decode(codes)).max()) / 2
    return TeacherComparison(
        name=name,
        num_rows=len(rows),
        temperatures=tuple(TEMPERATURES),
        mean_kl=tuple(divergences.mean(dim=0).tolist()),
        max_kl=tuple(divergences.amax(dim=0).tolist()),
        certified_kl=tuple(_certified(cache.certificates[name], document, value) for value in TEMPERATURES),
        largest_logit_difference=difference,
    )


def _live_rows(work: Work, document: TeacherDocument, rows: np.ndarray) -> Tensor:
    """Run the teacher on the batches that hold the rows, and take these rows [row, class]."""
    places = dict(_places(work.row_map, rows))
    with work.stored_teacher(document.name).running(document.codec) as (run, head):
        batches = BatchLogits(document.name, run, work.inputs, num_classes=document.num_classes, head=head)
        stream = zip(places, batches.stream(list(places)), strict=True)
        parts = [logits[torch.from_numpy(places[key]).to(logits.device)] for key, logits in stream]
    return torch.cat([part.cpu() for part in parts])


def _places(row_map: RowMap, rows: np.ndarray) -> Iterator[tuple[BatchKey, np.ndarray]]:
    """Yield each batch that is needed, in the order of the rows, and which of its rows."""
    views, within = np.divmod(rows, row_map.plan.cache.padded_rows)
    examples = np.searchsorted(row_map.first_row, within, side="right") - 1
    batches = examples // row_map.plan.batch_size
    for view, batch in sorted(set(zip(views.tolist(), batches.tolist(), strict=True))):
        key = BatchKey(view, batch)
        first, _ = row_map.rows_of_batch(key)
        yield key, within[(views == view) & (batches == batch)] - first


def _certified(certificate: CertificateDocument, document: TeacherDocument, temperature: float) -> float:
    stated = certificate_of([certificate], temperature, targets=[guarded_kl(document.codec)])
    return max(value for value in (stated.kl_bound, stated.max_kl) if value is not None)


def _findings(teacher: TeacherComparison, seed: int) -> Iterator[Finding]:
    """Tell a teacher whose rows exceed what is certified: once, however many temperatures show it."""
    columns = zip(teacher.max_kl, teacher.certified_kl, teacher.temperatures, strict=True)
    beyond = [column for column in columns if column[0] > column[1] * (1 + TOLERANCE) + SMALLEST_KL]
    if not beyond:
        return
    found, certified, temperature = max(beyond, key=lambda column: column[0] - column[1])
    yield Finding(
        where=f"teacher {teacher.name!r}",
        what=(
            f"rows are further from the live teacher than is certified, at {len(beyond)} of "
            f"{len(teacher.temperatures)} temperatures; furthest at temperature {temperature:g}, where a row of "
            f"{teacher.num_rows} drawn with seed {seed} has a KL of {found:.4g} nats, and the certificate says "
            f"{certified:.4g} at most"
        ),
        kind="differs_from_teacher",
        key=f"teachers/{teacher.name}/zarr.json",
        remedy=(
            "Compare on the hardware, and in the precision, that built the cache; if rows still differ, the cache "
            "is not of this teacher: build it anew at another address."
        ),
        teacher=teacher.name,
        expected=f"{certified:.6g}",
        found=f"{found:.6g}",
    )
