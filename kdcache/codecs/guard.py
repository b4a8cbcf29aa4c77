"""The guard of codecs without a finer code for a single row: rows that break a target for KL are refused, never stored.

The spectral codec guards its rows by coding them again; see there. Codes and topk cannot: the step of a row of codes
follows from the row's range, and topk keeps equally many classes of every row.
"""

from __future__ import annotations

__all__ = ["DEFAULT_MAX_KL", "GUARD_FACTOR", "breach_of_target", "guarded_kl", "refuse_beyond_target"]

from jaxtyping import Float64
from torch import Tensor

from kdcache.codecs.divergence import TEMPERATURES
from kdcache.documents.codec_specs import CodecSpec, Codes, Spectral, TopK
from kdcache.errors import CodecError

GUARD_FACTOR = 2.0
"""No row's KL may exceed the target by more than this factor; their mean may not exceed it at all."""


DEFAULT_MAX_KL = 0.01
"""Target of a `Spectral` that names neither a target nor a step, in nats."""


def guarded_kl(spec: CodecSpec) -> float | None:
    """Give the target in nats that a codec guards every row with; None where it guards none.

    Sampled tails are none: the KL that is guarded for them leaves out how the tail is shared out.
    """
    if isinstance(spec, Spectral):
        return None if spec.step is not None else spec.max_kl or DEFAULT_MAX_KL
    if isinstance(spec, TopK) and spec.tail == "samples":
        return None
    return spec.max_kl if isinstance(spec, Codes | TopK) else None


def breach_of_target(
    measured: Float64[Tensor, "row temperature"], target: float, *, tolerance: float = 0.0
) -> str | None:
    """Say how rows break a target: their mean KL exceeds it at a temperature, or one of them exceeds twice of it.

    Parameters
    ----------
    measured : Tensor [row, temperature]
        KL of all rows, at least one, that are encoded together, or upper bounds of it, at `TEMPERATURES`, in nats.
    target : float
        In nats.
    tolerance : float, default 0.0
        Share of the target by which both limits may be passed.

    Returns
    -------
    str or None
        Names the row with the largest KL; None where the target holds.
    """
    place = int(measured.amax(dim=0).argmax())
    row = int(measured[:, place].argmax())
    largest = float(measured[row, place])
    mean, warmest = (float(value) for value in measured.mean(dim=0).max(dim=0))
    limit = (1 + tolerance) * target
    if largest <= GUARD_FACTOR * limit and mean <= limit:
        return None
    told = f"Row {row} has a KL of {largest:.3g} nats at temperature {TEMPERATURES[place]:g}"
    if not largest <= GUARD_FACTOR * limit:
        return f"{told}, where max_kl={target:g} allows a row twice of it"
    return (
        f"{told}, the largest of {len(measured)} rows whose mean is {mean:.3g} at temperature "
        f"{TEMPERATURES[int(warmest)]:g}, above max_kl={target:g}"
    )


def refuse_beyond_target(measured: Float64[Tensor, "row temperature"], target: float, *, remedy: str) -> None:
    """Refuse rows that break a target; see `breach_of_target`.

    Parameters
    ----------
    measured : Tensor [row, temperature]
        KL of all rows, at least one, that are encoded together, or upper bounds of it, at `TEMPERATURES`, in nats.
    target : float
        In nats.
    remedy : str
        What can hold such rows, as an imperative.

    Raises
    ------
    CodecError
        The message names the row with the largest KL.
    """
    told = breach_of_target(measured, target)
    if told is None:
        return
    raise CodecError(
        f"{told}. The codec has no finer code for a single row. At a new address, {remedy}, or take a larger max_kl; "
        "where it was chosen for a target, a pilot that holds such rows (num_pilot_rows) chooses another."
    )
