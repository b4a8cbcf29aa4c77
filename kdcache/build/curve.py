"""The size/fidelity curve of a plan: what a fitted basis costs and keeps at other steps, and when it pays."""

from __future__ import annotations

__all__ = ["break_even_rows", "further_candidates", "is_uint8_codes", "spectral_parameter_bytes"]

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kdcache.build.candidates import Candidate, fitted_rows, made_rows, measure_codec, step_rows
from kdcache.codecs import Codec, SpectralCodec, fitted_codec
from kdcache.codecs.head_logits import Logits
from kdcache.codecs.spectral.guard import NUM_LEVELS
from kdcache.documents import CodecSpec, Codes, PlanDocument, Spectral
from kdcache.errors import CodecError

WIDE_BASIS_BYTES = 256_000_000
"""A basis above this is worth a thought: every training process holds it. Plans measure smaller ranks of it."""

_STEP_FACTORS = (4.0, 2.0, 0.5, 0.25)  # KL goes with the step's square
_RANK_DIVISORS = (2, 4)
_LARGEST_TARGET = 1.0

Fitted = tuple[Codec, Mapping[str, np.ndarray]]


def break_even_rows(
    parameter_bytes: float, bytes_per_row: float, *, other_bytes_per_row: float, other_parameter_bytes: float = 0
) -> int | None:
    """Count the rows from which a codec with large parameters takes no more bytes than another one.

    Rows n with n bytes_per_row + parameter_bytes <= n other_bytes_per_row + other_parameter_bytes.

    Parameters
    ----------
    parameter_bytes, bytes_per_row : float
        Of the codec.
    other_bytes_per_row, other_parameter_bytes : float
        Of what it is held against.

    Returns
    -------
    int or None
        The smallest such number of rows; None where the other's rows are no larger, so that it never pays.

    Examples
    --------
    >>> break_even_rows(1_000_000, 56, other_bytes_per_row=256)
    5000
    >>> break_even_rows(1_000_000, 300, other_bytes_per_row=256) is None
    True
    """
    surplus = parameter_bytes - other_parameter_bytes
    saved = other_bytes_per_row - bytes_per_row
    if saved <= 0:
        return None if surplus > 0 or saved < 0 else 0
    return max(0, math.ceil(surplus / saved))


def spectral_parameter_bytes(num_classes: int, rank: int) -> int:
    """Count the bytes of a spectral codec's parameters: a float16 basis, mean and weights a class, and the steps.

    Examples
    --------
    >>> spectral_parameter_bytes(128_000, 4096)
    1049600384
    """
    return 2 * num_classes * rank + 8 * num_classes + 4 * NUM_LEVELS


def is_uint8_codes(spec: CodecSpec) -> bool:
    """Tell whether a spec is that of plain uint8 codes, with or without a target."""
    return isinstance(spec, Codes) and spec.model_copy(update={"max_kl": None}) == Codes()


def further_candidates(
    chosen: Candidate, measured: Sequence[Candidate], logits: Logits, plan: PlanDocument
) -> list[Candidate]:
    """Measure points beside a fitted basis, on held-out rows, without fitting it again.

    A basis with a target is coded with targets 16 and 4 times larger and smaller, which takes steps about 4 and 2 times
    coarser and finer; one with a fixed step, with such steps. uint8 codes are measured where they were not yet. Of a
    basis above `WIDE_BASIS_BYTES` half and a quarter of the rank are fitted anew, with about its step and no guard.

    Parameters
    ----------
    chosen : Candidate
    measured : sequence of Candidate
        As `choose_codec` gives them.
    logits : Tensor [row, class]
        The pilot.
    plan : PlanDocument

    Returns
    -------
    list of Candidate
        Those that could be coded; none where no basis was fitted.
    """
    base = next((item for item in (chosen, *measured) if isinstance(item.codec, SpectralCodec)), None)
    if base is None or not isinstance(base.codec, SpectralCodec):
        return []
    found = []
    for fit in _fits(base.codec, base.parameters, measured, logits):
        try:
            codec, parameters = fit()
            found.append(measure_codec(codec, parameters, logits, plan))
        except CodecError:  # no step of it meets this target
            continue
    return found


def _fits(
    codec: SpectralCodec, parameters: Mapping[str, np.ndarray], measured: Sequence[Candidate], logits: Logits
) -> Iterator[Callable[[], Fitted]]:
    if not any(is_uint8_codes(item.codec.spec) for item in measured):
        yield partial(fitted_codec, Codes(), codec.num_classes, made_rows(logits))
    for factor in _STEP_FACTORS:
        if codec.max_kl is None or factor**2 * codec.max_kl <= _LARGEST_TARGET:
            yield partial(_with_other_step, codec, parameters, factor, logits)
    if spectral_parameter_bytes(codec.num_classes, codec.num_components) > WIDE_BASIS_BYTES:
        for divisor in _RANK_DIVISORS:
            yield partial(_with_rank, codec, parameters, max(1, codec.num_components // divisor), logits)


def _with_other_step(codec: SpectralCodec, parameters: Mapping[str, Any], factor: float, logits: Logits) -> Fitted:
    """Give the codec with a step about so many times larger, by way of its target where it has one."""
    if codec.max_kl is None:
        return codec.with_step(parameters, _step_of(parameters) * factor)
    spec = Spectral.make(**{**dict(codec.spec), "max_kl": codec.max_kl * factor**2})
    other = SpectralCodec(spec, codec.num_classes)
    return other, other.with_fitted_step(parameters, step_rows(logits))


def _with_rank(codec: SpectralCodec, parameters: Mapping[str, Any], rank: int, logits: Logits) -> Fitted:
    """Fit fewer components, and code them with a step as long as the given codec's along the first axis."""
    spec = Spectral.make(**{**dict(codec.spec), "max_kl": None, "step": 1.0, "rank": rank})
    cut, cut_parameters = SpectralCodec.fitted(spec, codec.num_classes, fitted_rows(logits))
    ratio = _first_axis_length(parameters) / _first_axis_length(cut_parameters)
    return cut.with_step(cut_parameters, _step_of(parameters) * ratio)


def _step_of(parameters: Mapping[str, Any]) -> float:
    return float(parameters["steps"][SpectralCodec.base_level])


def _first_axis_length(parameters: Mapping[str, Any]) -> float:
    return float(np.linalg.norm(parameters["basis"][0].astype(np.float64)))
