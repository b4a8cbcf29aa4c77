"""Codecs for a budget of bytes a row: the finest target of a basis, and the most kept classes, that still fit.

Everything is measured, on the rows on which a basis finds its step; what was found is then measured on held-out rows.
"""

from __future__ import annotations

__all__ = ["KEPT_CLASSES", "RANK_DIVISORS", "bases_within", "topk_within"]

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kdcache.build.candidates import Candidate, attempt, measure_codec, step_rows, stored_bytes_per_row
from kdcache.codecs import Decoder, SpectralCodec, parameters_to
from kdcache.codecs.head_logits import Logits
from kdcache.documents import PlanDocument, Spectral, TopK
from kdcache.errors import CodecError

KEPT_CLASSES = (8, 16, 32, 64)
"""Of topk with class means: the KL of a sampled tail leaves out how the tail is shared."""

RANK_DIVISORS = (2, 4)
"""Parts of a rank that are measured too where the parameters are dear."""

_FINEST, _COARSEST = 1e-6, 1.0  # nats
_LEAST_CHOSEN = 1e-5
_ROOM = 16.0  # over a target that could not be met: rows may lie four times further out than those searched on
_ROUNDS = 9  # halvings of the logarithm: to 3% of the target, which is about a hundredth of the bytes
_RETRIES = 4
_COARSER = 1.1  # a target so much larger takes about a hundredth fewer bytes
_LARGE_SHARE = 0.25
_INTERPOLATIONS = 3
_MOST_KEPT_CLASSES = 4096


def bases_within(budget: float, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    """Find the smallest target with which a basis keeps within a budget, at its rank, and at less where it is dear.

    Nine targets are tried for each rank. Each takes six passes over at most 256 rows to fit its step, and one encoding
    of them, with the guard's; the target that was found is encoded on held-out rows, up to five times. Half and a
    quarter of the rank are fitted and searched too where the parameters take more than a quarter of the budget.

    Parameters
    ----------
    budget : float
        Bytes a row, parameters included.
    logits : Tensor [row, class] or HeadLogits
        The pilot.
    plan : PlanDocument

    Yields
    ------
    Candidate
        With a target, which guards every row. One above the budget is given where none keeps within it, so that it can
        be told.
    """
    full = attempt(Spectral(max_kl=0.01), logits, plan) or attempt(Spectral(max_kl=_COARSEST), logits, plan)
    if full is None:
        return
    yield _within(budget, full, logits, plan) or full
    rank = full.codec.num_columns - 1
    if full.parameter_bytes <= _LARGE_SHARE * budget * _num_rows(plan):
        return
    for divisor in RANK_DIVISORS:
        cut = attempt(Spectral(max_kl=_COARSEST, rank=rank // divisor), logits, plan) if rank >= divisor else None
        found = None if cut is None else _within(budget, cut, logits, plan)
        if found is not None:
            yield found


def topk_within(budget: float, logits: Logits, plan: PlanDocument) -> Iterator[Candidate]:
    """Measure topk with 8, 16, 32 and 64 kept classes, twice as many as long as they fit, and what fits between."""
    last: Candidate | None = None
    k = KEPT_CLASSES[0]
    while k < min(plan.cache.num_classes, _MOST_KEPT_CLASSES + 1):
        found = attempt(TopK(k=k), logits, plan)
        if found is not None:
            yield found
        if found is None or not _is_within(found, budget, plan):
            if last is not None and found is not None:
                yield from _between(last, found, budget, logits, plan)
            if found is None or k >= KEPT_CLASSES[-1]:
                return
        last, k = found, 2 * k


def _between(
    fitting: Candidate, exceeding: Candidate, budget: float, logits: Logits, plan: PlanDocument
) -> Iterator[Candidate]:
    """Measure numbers of kept classes that the bytes of a smaller and a larger one make likely to fit."""
    for _ in range(_INTERPOLATIONS):
        few, many = (item.codec.spec.k for item in (fitting, exceeding) if isinstance(item.codec.spec, TopK))
        low, high = (item.bytes_over(_num_rows(plan)) for item in (fitting, exceeding))
        k = few + int((many - few) * (budget - low) / (high - low)) if low <= budget < high else few
        found = attempt(TopK(k=k), logits, plan) if k > few else None
        if found is None:
            return
        yield found
        fitting, exceeding = (found, exceeding) if _is_within(found, budget, plan) else (fitting, found)


def _within(budget: float, basis: Candidate, logits: Logits, plan: PlanDocument) -> Candidate | None:
    """Give the basis with the smallest target that keeps within the budget; None where none does."""
    if basis.parameter_bytes >= budget * _num_rows(plan) or not isinstance(basis.codec, SpectralCodec):
        return None
    target = _smallest_target(budget, basis, logits, plan)
    for _ in range(1 + _RETRIES):  # held-out rows may take a little more than those searched on
        found = _measured(basis, min(target, _COARSEST), logits, plan)
        if found is not None and _is_within(found, budget, plan):
            return found
        if target >= _COARSEST:
            break
        target *= _COARSER
    return None


def _smallest_target(budget: float, basis: Candidate, logits: Logits, plan: PlanDocument) -> float:
    """Find the smallest target that keeps within the budget, with room above those that no step meets."""
    low, high, refused = float(np.log(_FINEST)), float(np.log(_COARSEST)), 0.0
    for _ in range(_ROUNDS):
        target = float(np.exp((low + high) / 2))
        num_bytes = _searched_bytes(basis, target, logits, plan)
        if num_bytes is None:
            refused = max(refused, target)
        if num_bytes is not None and num_bytes <= budget:
            high = float(np.log(target))
        else:
            low = float(np.log(target))
    return max(float(np.exp(high)), _ROOM * refused, _LEAST_CHOSEN)


def _searched_bytes(basis: Candidate, target: float, logits: Logits, plan: PlanDocument) -> float | None:
    """Count the bytes a row, parameters included; None where the target cannot be met."""
    rows = step_rows(logits)
    try:
        codec, parameters = _with_target(basis, target, logits)
        codes = Decoder(codec, parameters_to(parameters, rows.device)).encode_measured(rows)[0]
    except CodecError:
        return None
    return stored_bytes_per_row(codes, codec, plan) + basis.parameter_bytes / _num_rows(plan)


def _measured(basis: Candidate, target: float, logits: Logits, plan: PlanDocument) -> Candidate | None:
    try:
        return measure_codec(*_with_target(basis, target, logits), logits, plan)
    except CodecError:
        return None


def _with_target(basis: Candidate, target: float, logits: Logits) -> tuple[SpectralCodec, Mapping[str, Any]]:
    spec = Spectral.make(**{**dict(basis.codec.spec), "max_kl": float(f"{target:.4g}")})
    codec = SpectralCodec(spec, basis.codec.num_classes)
    return codec, codec.with_fitted_step(basis.parameters, step_rows(logits))


def _is_within(candidate: Candidate, budget: float, plan: PlanDocument) -> bool:
    return candidate.bytes_over(_num_rows(plan)) <= budget


def _num_rows(plan: PlanDocument) -> int:
    return plan.cache.num_rows * plan.cache.num_views
