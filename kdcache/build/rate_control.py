"""Rate control: choose the codec from what was measured on held-out rows of the pilot."""

from __future__ import annotations

__all__ = ["Candidate", "choose_codec", "held_out_rows", "made_rows", "measure_codec"]

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.build.plan import chunk_rows_of
from kdcache.build.refusals import counted_from, nothing_meets
from kdcache.build.task import certify_codes
from kdcache.codecs import Codec, Decoder, SpectralCodec, codec_for, fitted_codec, parameters_to
from kdcache.codecs.base import row_blocks
from kdcache.codecs.fidelity import measure_codes
from kdcache.codecs.guard import GUARD_FACTOR
from kdcache.codecs.head_logits import HeadLogits, Logits, rows_of
from kdcache.codecs.rounding import coarsest_dtype
from kdcache.documents import (
    CertificateDocument,
    CodecSpec,
    Codes,
    Lossless,
    PlanDocument,
    RateTarget,
    Spectral,
    TopK,
)
from kdcache.errors import CodecError
from kdcache.store.shards import encode_shard
from kdcache.store.teachers import codec_shard_spec

MAX_HELD_OUT_ROWS = 512
_MADE_ELEMENTS = 2**27
_MEASURED_ELEMENTS = 2**24
_TARGET_TEMPERATURES = (1.0, 2.0, 4.0)
_STEP_ROUNDS = 8
MIN_ROWS_FOR_BASIS = 64
_KEPT_CLASSES = (8, 16, 32, 64)  # with class means: the KL of a sampled tail leaves out how the tail is shared


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fitted codec and what it did to held-out rows.

    Parameters
    ----------
    codec : Codec
    parameters : dict of str to ndarray
    bytes_per_row : float
        Stored and compressed, parameters excluded.
    parameter_bytes : int
        Stored once a teacher.
    certificate : CertificateDocument
        Fidelity on the held-out rows.
    mean_kl, max_kl : float
        Mean over and largest of all held-out rows, the largest over temperatures 1, 2 and 4, in nats.
    encode_seconds_per_row : float
        Encoding, decoding and measuring.
    """

    codec: Codec
    parameters: Mapping[str, np.ndarray]
    bytes_per_row: float
    parameter_bytes: int
    certificate: CertificateDocument
    mean_kl: float
    max_kl: float
    encode_seconds_per_row: float

    def bytes_over(self, num_rows: int) -> float:
        """Bytes a row with the parameters' bytes spread over so many rows."""
        return self.bytes_per_row + self.parameter_bytes / num_rows


def held_out_rows(logits: Logits) -> Logits:
    """Give the pilot's last eighth, 512 rows at most, or all of a small pilot: rows that no candidate is fitted to."""
    count = min(MAX_HELD_OUT_ROWS, len(logits) // 8)
    return logits if len(logits) < MIN_ROWS_FOR_BASIS else rows_of(logits, slice(-count, None))


def _shown_rows(logits: Logits) -> Tensor:
    """Give the rows that are not held out, made; all of a small pilot."""
    if len(logits) < MIN_ROWS_FOR_BASIS:
        return made_rows(logits)
    return made_rows(rows_of(logits, slice(None, -len(held_out_rows(logits)))))


def made_rows(logits: Logits) -> Tensor:
    """Give the pilot as rows of logits; of hidden states the last ones are made, as many as memory should hold."""
    if isinstance(logits, Tensor):
        return logits
    return logits[-max(MAX_HELD_OUT_ROWS, _MADE_ELEMENTS // logits.shape[1]) :]


def choose_codec(logits: Logits, plan: PlanDocument) -> tuple[Candidate, list[Candidate]]:
    """Fit the codec that was asked for, or the best of those that reach what was asked for.

    Parameters
    ----------
    logits : Tensor [row, class] or HeadLogits
        The pilot.
    plan : PlanDocument
        The codec or target that was asked for, and the cache's classes, rows and chunks.

    Returns
    -------
    Candidate
        The choice. With `max_kl`: of those whose mean KL on held-out rows is at most the target at temperatures 1, 2
        and 4 (and, of codecs that cannot code a single row more finely, whose largest is), the one with the fewest
        bytes, parameters included; its spec holds the target, so that tasks guard their rows wherever they run. With
        `bytes_per_row`: of those that keep within it, the one with the least mean KL.
    list of Candidate
        All that were measured, the choice among them.

    Raises
    ------
    CodecError
        The codec cannot hold the pilot, or no codec reaches the target; the message says what came nearest.
    """
    planned, cache = plan.codec, plan.cache
    if not isinstance(planned, RateTarget):
        codec, parameters = fitted_codec(planned, cache.num_classes, logits)
        with counted_from(len(logits) - len(held_out_rows(logits))):
            only = measure_codec(codec, parameters, logits, plan)
        return only, [only]
    num_rows = cache.num_rows * cache.num_views
    found = list(_candidates(planned, logits, plan))
    if planned.max_kl is not None:
        meeting = [item for item in found if _meets(item, planned.max_kl)]
        if meeting:
            smallest = min(meeting, key=lambda item: item.bytes_over(num_rows))
            chosen = _guarded(smallest, planned.max_kl)
            return chosen, [chosen if item is smallest else item for item in found]
    elif planned.bytes_per_row is not None:
        within = [item for item in found if item.bytes_over(num_rows) <= planned.bytes_per_row]
        if within:
            return min(within, key=lambda item: item.mean_kl), found
    raise CodecError(nothing_meets(planned, [(item.codec.spec, item) for item in found], num_rows))


def measure_codec(
    codec: Codec,
    parameters: Mapping[str, np.ndarray],
    logits: Logits,
    plan: PlanDocument,
    *,
    max_rows: int = MAX_HELD_OUT_ROWS,
) -> Candidate:
    """Encode the pilot's held-out rows, the last `max_rows` of them, and measure bytes, fidelity and time."""
    decoder = Decoder(codec, parameters_to(parameters, logits.device))
    held_out = rows_of(held_out_rows(logits), slice(-max_rows, None))
    held_out = held_out if isinstance(codec, SpectralCodec) else held_out[:]
    start = time.perf_counter()
    codes, errors = decoder.encode_measured(held_out)
    certificate = certify_codes(decoder, held_out, codes, errors)
    seconds = time.perf_counter() - start
    divergences = _measured(decoder, held_out, codes)  # of all rows: a sample may mislead
    return Candidate(
        codec=codec,
        parameters=parameters,
        bytes_per_row=_stored_bytes(codes.cpu().numpy(), codec, plan) / len(held_out),
        parameter_bytes=sum(array.nbytes for array in parameters.values()),
        certificate=certificate,
        mean_kl=float(divergences.mean(dim=0).max()),
        max_kl=float(divergences.max()),
        encode_seconds_per_row=seconds / len(held_out),
    )


def _measured(decoder: Decoder, logits: Logits, codes: Tensor) -> Tensor:
    """Measure KL [row, temperature] of all rows, a block of them at a time."""
    blocks = row_blocks(*logits.shape, max_elements=_MEASURED_ELEMENTS)
    found = [measure_codes(decoder, logits[block], codes[block], _TARGET_TEMPERATURES) for block in blocks]
    return torch.cat(found)


def _candidates(target: RateTarget, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    for spec in _plain_specs(logits.dtype):
        found = _attempt(spec, logits, plan)
        if found is not None:
            yield found
            if target.max_kl is not None and _meets(found, target.max_kl):
                break  # the finer ones are larger
    if len(logits) < MIN_ROWS_FOR_BASIS or plan.cache.num_classes < 3:
        return
    if target.max_kl is not None:
        yield from _bases(target.max_kl, logits, plan)
    elif target.bytes_per_row is not None:
        yield from _within_budget(target.bytes_per_row, logits, plan)
    for k in _KEPT_CLASSES:
        found = _attempt(TopK(k=k), logits, plan) if k < plan.cache.num_classes else None
        if found is not None:
            yield found


def _plain_specs(dtype: torch.dtype) -> list[CodecSpec]:
    """List codecs that keep each class by itself, the coarser ones first; what 16 bits hold is kept as it is."""
    if dtype == torch.bfloat16:
        return [Codes(), Lossless(dtype="bfloat16")]
    if dtype == torch.float16:
        return [Codes(), Lossless(dtype="float16")]
    return [Codes(), Codes(dtype="uint16"), Lossless()]


def _bases(max_kl: float, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    """Fit a basis; one that holds the rounding of 16-bit logits too, where a target lies below it and it can."""
    found = _attempt(Spectral(max_kl=max_kl), logits, plan)
    if found is not None:
        yield found
    is_met = found is not None and _meets(found, max_kl)
    num_classes = plan.cache.num_classes
    if is_met or isinstance(logits, HeadLogits):  # whose basis spans all that the head can give
        return
    if num_classes <= len(logits) and coarsest_dtype(logits) is not None:
        exact = _attempt(Spectral(max_kl=max_kl, rank=num_classes - 1), logits, plan)
        if exact is not None:
            yield exact


def _attempt(spec: CodecSpec, logits: Logits, plan: PlanDocument) -> Candidate | None:
    """Fit and measure a codec, on hidden states where it is one for them; None where it cannot hold these logits.

    The last rows of the pilot are held out from every fit and are what every codec is measured on.
    """
    pilot = logits if isinstance(spec, Spectral) else _shown_rows(logits)
    try:
        codec, parameters = fitted_codec(spec, plan.cache.num_classes, pilot)
        return measure_codec(codec, parameters, logits, plan)
    except CodecError:
        return None


def _within_budget(budget: float, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    """Find the step with which a basis just keeps within a budget of bytes a row, by halving intervals of its log."""
    first = _attempt(Spectral(max_kl=0.01), logits, plan)
    if first is None or not isinstance(first.codec, SpectralCodec):
        return
    num_rows = plan.cache.num_rows * plan.cache.num_views
    base = float(first.parameters["steps"][SpectralCodec.base_level])
    low, high = base / 1024, base * 1024
    best: Candidate | None = None
    for _ in range(_STEP_ROUNDS * 2):
        step = float(np.sqrt(low * high))
        codec, parameters = first.codec.with_step(first.parameters, step)
        try:
            found = measure_codec(codec, parameters, logits, plan)
        except CodecError:  # so fine a step that codes do not reach
            low = step
            continue
        if found.bytes_over(num_rows) <= budget:
            best, high = found, step
        else:
            low = step
    yield first if best is None else best  # the one above the budget is told, where none is within


def _meets(candidate: Candidate, target: float) -> bool:
    is_guarded = isinstance(candidate.codec, SpectralCodec)
    limit = GUARD_FACTOR * target if is_guarded else target
    return candidate.mean_kl <= target * (1 + 1e-6) and candidate.max_kl <= limit * (1 + 1e-6)


def _guarded(candidate: Candidate, target: float) -> Candidate:
    """Give the candidate with the target in its spec: the codes are the same, and rows that break it are refused."""
    spec = candidate.codec.spec
    if not isinstance(spec, Codes | TopK):
        return candidate  # a basis holds it already, and lossless needs none
    guarded = type(spec).make(**{**dict(spec), "max_kl": target})
    return replace(candidate, codec=codec_for(guarded, candidate.codec.num_classes))


def _stored_bytes(codes: np.ndarray, codec: Codec, plan: PlanDocument) -> float:
    chunk_rows = chunk_rows_of(plan, codec.spec)
    chunk_rows = min(chunk_rows, max(len(codes) // 8 * 8, 1))  # bits are shuffled by eights; real chunks fit
    whole = len(codes) // chunk_rows * chunk_rows
    spec = codec_shard_spec(
        codec.spec,
        shard_rows=whole,
        chunk_rows=chunk_rows,
        num_columns=codec.num_columns,
        storage_dtype=codec.storage_dtype,
    )
    return len(encode_shard(codes[:whole], spec)) * len(codes) / whole
