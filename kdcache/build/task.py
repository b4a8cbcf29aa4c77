"""Tasks: one teacher's logits for one shard, encoded, measured and published.

A *task* is a pure function of (plan, teacher, shard). It is done when its record stands and the record's digest is that
of the stored shard; nothing else counts, so a task may run twice, in two places, or be lost, and harm nothing.
"""

from __future__ import annotations

__all__ = [
    "Destination",
    "certify",
    "certify_codes",
    "measure_every_row",
    "publish_shard",
    "remaining_shards",
    "run_tasks",
]

import functools
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from kdcache.build.failures import FailedShard
from kdcache.build.inference import BatchLogits, shard_logits
from kdcache.build.refusals import ROW
from kdcache.build.rows import RowMap
from kdcache.codecs import (
    BOUND_TEMPERATURES,
    LADDER,
    Decoder,
    codec_for,
    error_range,
    measure,
    measure_codes,
    parameters_to,
    scaled_bounds,
)
from kdcache.codecs.base import row_blocks, rows_of_codes
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.guard import breach_of_target, guarded_kl
from kdcache.codecs.head_logits import Logits, on_device
from kdcache.codecs.row_errors import RowErrors
from kdcache.documents import BoundDocument, CacheDocument, CertificateDocument, Histogram, Record, TeacherDocument
from kdcache.errors import CodecError, CorruptCacheError, NonFiniteLogitsError
from kdcache.store import CacheStore
from kdcache.threads import LoopThreads

ENCODING_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Shards of a process that are encoded and written at once, while the teacher goes on with the next."""

_SECONDS_TO_PUBLISH = 600.0
"""How long a build that stops waits for the shards that it is at: whoever goes on afterwards shall not meet them."""
HASHING_THREADS = 8
"""Published shards looked at once when a build is resumed."""

RESUMED_BYTES = 2**34
"""Published bytes whose digests are checked when a build is resumed: half a minute of a disk, or of an object store."""

MEASURED_ELEMENTS = 2**21
"""Logits of a shard whose KL is measured at most; every row's error range is always measured."""

ADOPTED_ERROR_FACTOR = 4.0
"""How much further from our logits another builder's unrecorded shard may be than our own, before it is refused."""

ADOPTED_KL = 0.02
"""What its mean KL may be beyond that, in nats, where a codec has no error range."""

ADOPTED_TOLERANCE = 0.05
"""Share by which it may pass the codec's target, held against logits that other hardware has rounded otherwise."""


@dataclass(frozen=True, eq=False)
class Destination:
    """Where one teacher's shards go, and how they are coded."""

    store: CacheStore
    cache: CacheDocument
    teacher: TeacherDocument
    decoder: Decoder

    @classmethod
    def open(cls, store: CacheStore, cache: CacheDocument, teacher: TeacherDocument) -> Destination:
        """Read the codec's parameters and make the destination."""
        codec = codec_for(teacher.codec, teacher.num_classes)
        return cls(store, cache, teacher, Decoder(codec, parameters_to(store.parameters(teacher), "cpu")))


def run_tasks(
    destination: Destination, batches: BatchLogits, row_map: RowMap, shard_indices: Sequence[int]
) -> Iterator[Record | FailedShard]:
    """Run the tasks of several shards, and yield each record once its shard is published, or what stopped it.

    Inference goes on while earlier shards are encoded and written by other threads.
    """
    name = destination.teacher.name
    waiting: deque[tuple[int, Future[Record]]] = deque()
    threads = LoopThreads(ENCODING_THREADS, "kdcache-encode", seconds_to_leave=_SECONDS_TO_PUBLISH)
    try:
        for shard_index, logits in _logits_of_each(name, batches, row_map, shard_indices):
            if isinstance(logits, FailedShard):
                yield logits
                continue
            name_row = functools.partial(batches.name_row, shard_index)
            waiting.append((shard_index, threads.submit(publish_shard, destination, shard_index, logits, name_row)))
            while len(waiting) > ENCODING_THREADS or (waiting and waiting[0][1].done()):
                yield _outcome(name, *waiting.popleft())
        while waiting:
            yield _outcome(name, *waiting.popleft())
    finally:
        threads.leave()


def _logits_of_each(
    name: str, batches: BatchLogits, row_map: RowMap, shard_indices: Sequence[int]
) -> Iterator[tuple[int, Logits | FailedShard]]:
    """Yield each shard's logits, or what stopped the teacher, which begins anew with the next shard."""
    remaining = sorted(shard_indices)
    while remaining:
        try:
            for shard_index, logits in shard_logits(batches, row_map, remaining):
                remaining = remaining[1:]
                yield shard_index, logits
        except Exception as error:  # noqa: BLE001 - whatever the user's dataset or teacher raises
            failed, *remaining = remaining
            yield failed, FailedShard(name, failed, error)


def _outcome(name: str, shard_index: int, future: Future[Record]) -> Record | FailedShard:
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 - it is raised once the other shards are built
        return FailedShard(name, shard_index, error)


@torch.inference_mode()
def publish_shard(
    destination: Destination, shard_index: int, logits: Logits, name_row: Callable[[int], str] | None = None
) -> Record:
    """Encode one shard, measure it, publish it first-writer-wins, then publish its record.

    Parameters
    ----------
    destination : Destination
    shard_index : int
    logits : Tensor [row, class] or HeadLogits
        All rows of the shard, without padding; on any device.
    name_row : callable (row of the shard) -> str, optional
        Says which example a row is of, for messages.

    Raises
    ------
    CodecError
        The codec cannot hold these logits.
    CorruptCacheError
        A shard without a record stands there that does not belong to this teacher.
    """
    decoder = destination.decoder.to(logits.device)
    codes, errors = _encoded(destination, decoder, shard_index, logits, name_row)
    certificate = certify_codes(decoder, logits, codes, errors)
    array = codes.cpu().numpy()
    published = destination.store.publish_shard(destination.teacher, destination.cache, shard_index, array)
    if not published.created:
        certificate = _certify_standing(destination, shard_index, logits, array, certificate)
    record = Record.make(
        teacher=destination.teacher.name,
        shard_index=shard_index,
        num_rows=len(logits),
        num_bytes=published.num_bytes,
        sha256=published.sha256,
        min_logit=_smallest_finite(logits[:]) if errors is None else float(errors.lowest_logit.min()),
        max_logit=float(logits[:].max()) if errors is None else float(errors.highest_logit.max()),
        certificate=certificate,
        chunk_checksums=published.chunk_checksums,
        document_digest=destination.teacher.digest(),
    )
    destination.store.publish_record(record)
    return destination.store.record(destination.teacher.name, shard_index) or record


def _encoded(
    destination: Destination,
    decoder: Decoder,
    shard_index: int,
    logits: Logits,
    name_row: Callable[[int], str] | None,
) -> tuple[Tensor, RowErrors | None]:
    """Encode a shard's rows; a refusal says which example it is about, and what is kept."""
    try:
        return decoder.encode_measured(logits)
    except (CodecError, NonFiniteLogitsError) as error:
        named = ROW.search(str(error))
        about = f" Row {named[1]} of the shard is of {name_row(int(named[1]))}." if named and name_row else ""
        raise type(error)(
            f"cache {destination.store.address}: shard {shard_index} of teacher {destination.teacher.name!r} cannot be "
            f"encoded. {error}{about} Shards that are published are kept"
        ) from error


def certify(logits: Tensor, decoded: Tensor) -> CertificateDocument:
    """Measure what coding changed, where the decoded logits [row, class] are the same at every temperature.

    Error range and bounds are of all rows, KL at the ladder of all or of evenly spread rows.
    """
    rows = _measured_rows(logits)
    return _certified(measure(logits[rows], decoded[rows], LADDER), logits, decoded)


def _certified(divergences: Tensor, logits: Tensor, decoded: Tensor) -> CertificateDocument:
    return _bounded_certificate(divergences, scaled_bounds(logits, decoded), error_range(logits, decoded))


def certify_codes(
    decoder: Decoder, logits: Logits, codes: Tensor, errors: RowErrors | None = None
) -> CertificateDocument:
    """Measure what coding changed; without bounds where the codec's decoded logits depend on the temperature.

    Parameters
    ----------
    decoder : Decoder
        On the codes' device.
    logits : Tensor [row, class] or HeadLogits
        On the codes' device.
    codes : Tensor [row, column]
    errors : RowErrors, optional
        What is known of the rows' errors from encoding them.
    """
    if decoder.codec.depends_on_temperature:
        return _certificate(_measured(decoder, logits, codes))
    errors = errors or decoder.row_errors(logits, codes)
    divergences = _measured(decoder, logits, codes)
    if errors is not None:
        return _bounded_certificate(divergences, errors.scaled_bounds, errors.error_range)
    return _certified(divergences, logits[:], decoder.decode(codes))


def _bounded_certificate(divergences: Tensor, scaled: Tensor, error_ranges: Tensor) -> CertificateDocument:
    bounds = [
        BoundDocument.make(
            temperature=temperature,
            mean=float(column.mean()),
            max=float(column.max()),
            histogram=Histogram.of(column.tolist()),
        )
        for temperature, column in zip(BOUND_TEMPERATURES, scaled.cpu().double().unbind(dim=1), strict=True)
    ]
    return _certificate(divergences, max_error_range=float(error_ranges.max()), bounds=tuple(bounds))


def _measured(decoder: Decoder, logits: Logits, codes: Tensor) -> Tensor:
    """Measure KL [row, temperature] at the ladder, on all rows or evenly spread ones."""
    rows = _measured_rows(logits)
    return measure_codes(decoder, logits[rows], rows_of_codes(codes, rows), LADDER)


def _measured_rows(logits: Logits) -> Tensor:
    """Choose all rows, or evenly spread ones."""
    num_measured = max(1, min(len(logits), MEASURED_ELEMENTS // logits.shape[1]))
    return torch.linspace(0, len(logits) - 1, num_measured).long().to(logits.device)


def _certificate(divergences: Tensor, **bounds: Any) -> CertificateDocument:
    """Sum up KL [row, temperature] at the ladder."""
    return CertificateDocument.make(
        temperatures=LADDER,
        mean_kl=tuple(divergences.mean(dim=0).tolist()),
        max_kl=tuple(divergences.amax(dim=0).tolist()),
        kl_histograms=tuple(Histogram.of(column) for column in divergences.T.tolist()),
        num_measured_rows=len(divergences),
        **bounds,
    )


def _certify_standing(
    destination: Destination, shard_index: int, logits: Logits, ours: np.ndarray, certificate: CertificateDocument
) -> CertificateDocument:
    """Certify the shard that stood there first: the same bytes, or another run's on hardware that does not repeat."""
    reader = destination.store.codes_reader(destination.teacher, destination.cache)
    standing = reader.read_shard(shard_index)[: len(ours)]
    if np.array_equal(standing, ours):
        return certificate
    codes, on_cpu = torch.from_numpy(standing), on_device(logits, "cpu")
    foreign = _foreign(destination.decoder, on_cpu, codes, certificate) or _beyond_target(
        destination.decoder, on_cpu, codes
    )
    if foreign:
        raise CorruptCacheError(
            f"cache {destination.store.address}: shard {shard_index} of teacher {destination.teacher.name!r} stands "
            f"without a record, and {foreign}. It was not written by this build. Nothing was changed; delete the "
            "shard's file and run the same command again"
        )
    return certify_codes(destination.decoder, on_cpu, codes)


def _foreign(decoder: Decoder, logits: Logits, codes: Tensor, ours: CertificateDocument) -> str | None:
    """Say how another run's shard differs from the teacher, where it differs more than other hardware makes it."""
    if ours.max_error_range is not None:
        # infinite where other classes are masked
        errors = decoder.row_errors(logits, codes)
        if errors is None:
            made = logits[:]
            largest_error = float(error_range(made, decoder.decode(codes)).max())
            logit_span = float(made.max()) - _smallest_finite(made)
        else:
            largest_error = float(errors.error_range.max())
            logit_span = float(errors.highest_logit.max() - errors.lowest_logit.min())
        if largest_error <= ADOPTED_ERROR_FACTOR * ours.max_error_range + 0.02 * logit_span:
            return None
        return f"its logits differ from the teacher's by up to {largest_error:.3g} (ours: {ours.max_error_range:.3g})"
    theirs = _measured(decoder, logits, codes).mean(dim=0).tolist()
    for temperature, found, own in zip(ours.temperatures, theirs, ours.mean_kl, strict=True):
        if not found <= ADOPTED_ERROR_FACTOR * own + ADOPTED_KL:
            return (
                f"its soft targets differ from the teacher's by {found:.3g} nats on average at temperature "
                f"{temperature:g} (ours: {own:.3g})"
            )
    return None


def _beyond_target(decoder: Decoder, logits: Logits, codes: Tensor) -> str | None:
    """Say how another run's shard breaks the target that the certificate of this cache promises."""
    target = guarded_kl(decoder.codec.spec)
    if target is None:
        return None
    divergences = measure_every_row(decoder, logits, codes, TEMPERATURES)
    breach = breach_of_target(divergences, target, tolerance=ADOPTED_TOLERANCE)
    return None if breach is None else f"breaks the codec's target: {breach}"


def measure_every_row(
    decoder: Decoder, logits: Logits, codes: Tensor, temperatures: Sequence[float]
) -> Float64[Tensor, "row temperature"]:
    """Measure KL in nats of all rows, making logits for a block of them at a time."""
    blocks = row_blocks(*logits.shape, max_elements=MEASURED_ELEMENTS)
    return torch.cat([measure_codes(decoder, logits[block], codes[block], temperatures) for block in blocks])


def _smallest_finite(logits: Tensor) -> float:
    return float(logits.masked_fill(logits.isneginf(), torch.inf).min())


def remaining_shards(store: CacheStore, cache: CacheDocument, teacher: str) -> list[int]:
    """List the shards of a teacher that are not done: the plan minus what is published and intact.

    Every published shard's size is held against its record, and the digests of `RESUMED_BYTES` of them, evenly spread:
    `kdcache verify` reads all, which for terabytes takes hours.

    Raises
    ------
    CorruptCacheError
        A record stands whose shard is missing or altered: what is bad is named, never silently overwritten.
    """
    records = store.records(teacher)
    document = store.teacher(teacher)
    digests = {record.document_digest for record in records.values()} - {None}
    if document is not None and digests and digests != {document.digest()}:
        raise CorruptCacheError(
            f"cache {store.address}: the document of teacher {teacher!r} is not the one that its shards were encoded "
            f"under, so that they would be decoded wrongly. Nothing was changed. Run `kdcache repair {store.address}`, "
            f"or bring teachers/{teacher}/zarr.json back from a copy"
        )
    missing = [shard for shard in range(cache.num_shards) if shard not in records]
    published = {shard: records[shard] for shard in sorted(records) if shard < cache.num_shards}
    hashed = _evenly_spread(published, RESUMED_BYTES)
    sizes = store.shard_sizes(teacher) if published else {}
    with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="kdcache-hash") as pool:
        done = pool.map(
            lambda shard: _is_intact(store, cache, published[shard], sizes.get(shard), whole=shard in hashed), published
        )
        bad = [shard for shard, intact in zip(published, done, strict=True) if not intact]
    if bad:
        raise CorruptCacheError(
            f"cache {store.address}: teacher {teacher!r} has {len(bad)} shard(s) that no longer match their records: "
            f"{bad[:10]}. Nothing was changed. See them all with `kdcache verify {store.address}`; `kdcache repair "
            f"JOB`, or `kdcache repair {store.address}` and then the same build, drops them and builds only them anew"
        )
    return missing


def _evenly_spread(records: Mapping[int, Record], max_bytes: int) -> set[int]:
    """Choose shards, evenly spread, that are together of about so many bytes at most; all where they are fewer."""
    total = sum(record.num_bytes for record in records.values())
    step = max(1, -(-total // max_bytes))
    return set(list(records)[::step])


def _is_intact(store: CacheStore, cache: CacheDocument, record: Record, num_bytes: int | None, *, whole: bool) -> bool:
    """Tell whether a shard stands as its record says: its size, and if the whole of it is read, its digest."""
    teacher, shard_index = record.teacher, record.shard_index
    if record.num_rows != cache.rows_in_shard(shard_index) or num_bytes != record.num_bytes:
        return False
    if not whole:
        return True
    try:
        data = store.shard_bytes(teacher, shard_index)
    except (FileNotFoundError, CorruptCacheError):
        return False
    return hashlib.sha256(data).hexdigest() == record.sha256
