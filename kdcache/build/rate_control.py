"""Rate control: choose the codec from what was measured on held-out rows of the pilot."""

from __future__ import annotations

__all__ = ["choose_codec"]

from collections.abc import Iterator
from dataclasses import replace

import torch

from kdcache.build.budget import KEPT_CLASSES, RANK_DIVISORS, bases_within, topk_within
from kdcache.build.candidates import MIN_ROWS_FOR_BASIS, Candidate, attempt, fitted_rows, held_out_rows, measure_codec
from kdcache.build.refusals import counted_from, nothing_meets
from kdcache.codecs import SpectralCodec, codec_for, fitted_codec
from kdcache.codecs.guard import GUARD_FACTOR
from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.codecs.rounding import coarsest_dtype
from kdcache.documents import CodecSpec, Codes, Lossless, PlanDocument, RateTarget, Spectral, TopK
from kdcache.errors import CodecError


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
        `bytes_per_row`: of those that keep within it, the one with the least mean KL; a basis has a target then too.
    list of Candidate
        All that were measured, the choice among them.

    Raises
    ------
    CodecError
        The codec cannot hold the pilot, or no codec reaches the target; the message says what came nearest.
    """
    planned, cache = plan.codec, plan.cache
    if not isinstance(planned, RateTarget):
        codec, parameters = fitted_codec(planned, cache.num_classes, fitted_rows(logits))
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


def _candidates(target: RateTarget, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    for spec in _plain_specs(logits.dtype):
        found = attempt(spec, logits, plan)
        if found is not None:
            yield found
            if target.max_kl is not None and _meets(found, target.max_kl):
                break  # the finer ones are larger
    if len(logits) < MIN_ROWS_FOR_BASIS or plan.cache.num_classes < 3:
        return
    if target.max_kl is not None:
        yield from _bases(target.max_kl, logits, plan)
        yield from _topk(plan, logits)
    elif target.bytes_per_row is not None:
        yield from bases_within(target.bytes_per_row, logits, plan)
        yield from topk_within(target.bytes_per_row, logits, plan)


def _topk(plan: PlanDocument, logits: Logits) -> Iterator[Candidate]:
    for k in KEPT_CLASSES:
        found = attempt(TopK(k=k), logits, plan) if k < plan.cache.num_classes else None
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
    """Fit a basis; smaller ones too, where it outweighs its rows, and one that holds the rounding of 16-bit logits too.

    Half and a quarter of the rank often hold a target as well, where logits are not of low rank and rows are few. The
    rounding matters where a target lies below it.
    """
    found = attempt(Spectral(max_kl=max_kl), logits, plan)
    if found is not None:
        yield found
        yield from _smaller(found, max_kl, logits, plan)
    is_met = found is not None and _meets(found, max_kl)
    num_classes = plan.cache.num_classes
    if is_met or isinstance(logits, HeadLogits):  # whose basis spans all that the head can give
        return
    if num_classes <= len(logits) and coarsest_dtype(logits) is not None:
        exact = attempt(Spectral(max_kl=max_kl, rank=num_classes - 1), logits, plan)
        if exact is not None:
            yield exact


def _smaller(full: Candidate, max_kl: float, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    num_rows = plan.cache.num_rows * plan.cache.num_views
    if full.parameter_bytes <= full.bytes_per_row * num_rows:
        return
    for divisor in RANK_DIVISORS:
        rank = (full.codec.num_columns - 1) // divisor
        cut = attempt(Spectral(max_kl=max_kl, rank=rank), logits, plan) if rank else None
        if cut is None:  # its rows lie outside: those of fewer components do too
            return
        yield cut


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
