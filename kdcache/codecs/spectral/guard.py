"""The spectral codec's guard: rows are coded, measured, and coded again more finely until the target holds.

The target for KL, at temperatures 1, 2 and 4, holds in the mean over the rows that are encoded together (a shard), and
twice of it in every row.
"""

from __future__ import annotations

__all__ = [
    "LARGEST_CODE",
    "LEVELS_PER_OCTAVE",
    "NUM_LEVELS",
    "guarded",
    "mean_after_guard",
    "refuse_far",
    "rounded",
]

import math

import torch
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from torch import Tensor

from kdcache.codecs.guard import GUARD_FACTOR
from kdcache.codecs.row_errors import RowErrors
from kdcache.codecs.spectral.rows import SpectralRows, all_rows
from kdcache.errors import CodecError

NUM_LEVELS = 96
"""Steps that a row may be coded with: each is 2^(1/4) finer than the one before."""

LEVELS_PER_OCTAVE = 4

LARGEST_CODE = 32766
"""Largest magnitude of a code: its zigzag stays below the fill code."""

_ROUNDS = 24
_SAMPLED_ROWS = 256
_AIM = 0.98  # of a sampled mean, which is off by about 3 %
_AIM_ROUNDS = 8
_MOST_GAINED = 4.0  # levels; a row unlike its shard is not to start far off
_GOLDEN = (5**0.5 - 1) / 2
_MARGIN = 1.1  # KL falls by a half in two levels on average: rows that fall less would be coded a third time


def guarded(
    rows: SpectralRows,
    coordinates: Float[Tensor, "row component"],
    levels: Int64[Tensor, " row"],
    steps: Float[Tensor, " level"],
    target: float,
) -> tuple[Int32[Tensor, "row component"], RowErrors]:
    """Quantise rows, and refine rows until none exceeds twice the target and the mean meets it.

    Parameters
    ----------
    rows : SpectralRows
    coordinates : Tensor [row, component]
    levels : Tensor [row]
        What to start from; overwritten with what was used.
    steps : Tensor [level]
    target : float
        In nats.

    Raises
    ------
    CodecError
        A row cannot be coded so that the target holds.
    """
    if not len(rows):
        return rounded(coordinates, steps[levels][:, None]), rows.errors(all_rows(rows), coordinates, coordinates)
    finest = _finest_levels(coordinates, steps)
    levels.copy_(torch.minimum(levels, finest))
    coarser = _coarser(rows, coordinates, levels, steps, target)
    levels.copy_(torch.minimum((levels - coarser).clamp(min=0), finest))
    chosen = steps[levels][:, None]
    quantised = rounded(coordinates, chosen)
    errors = _measured(rows, all_rows(rows), quantised, chosen, target)
    for _ in range(_ROUNDS):
        finer = _refinements(errors, target)
        again = finer.nonzero()[:, 0]
        if not len(again):
            return quantised, errors
        if bool((levels[again] == finest[again]).any()):
            break
        levels[again] = torch.minimum(levels[again] + finer[again], finest[again])
        chosen = steps[levels[again]][:, None]
        quantised[again] = rounded(coordinates[again], chosen)
        errors.put(again, _measured(rows, again, quantised[again], chosen, target))
    worst = int(errors.kl_ceiling.amax(dim=1).nan_to_num(nan=torch.inf).argmax())
    raise CodecError(
        f"Row {worst} cannot be coded with max_kl={target:g}: with step {float(steps[levels[worst]]):.3g}, level "
        f"{int(levels[worst])} of {int(finest[worst])}, its KL is still {_ceiling_in_words(errors, worst)}. It lies "
        f"outside the {coordinates.shape[1]} components that the pilot showed, too far along them, or has logits so "
        "large that float32 cannot tell such a KL. At a new address, use a larger pilot (num_pilot_rows) or rank, a "
        "larger max_kl, or Codes(). None of these rows was encoded."
    )


def _coarser(
    rows: SpectralRows,
    coordinates: Float[Tensor, "row component"],
    levels: Int64[Tensor, " row"],
    steps: Float[Tensor, " level"],
    target: float,
) -> Int64[Tensor, " row"]:
    """Say by how many levels rows may start coarser, or must start finer, so that their mean comes close to the target.

    The step was fitted to the pilot; these rows may feel it otherwise. Some of them, evenly spread, are measured, and
    the levels that this leaves to be gained are given to all alike; of a part of a level, to so many rows, which are
    spread by the golden ratio, so that no period of theirs is met.
    """
    if len(rows) < 4 * _SAMPLED_ROWS:
        return torch.zeros_like(levels)
    sample = torch.linspace(0, len(rows) - 1, _SAMPLED_ROWS, device=levels.device).long()
    chosen = steps[levels[sample]][:, None]
    gained = _gained(rows.errors(sample, rounded(coordinates[sample], chosen), chosen).kl, target)
    whole = math.floor(gained)
    places = torch.arange(len(rows), device=levels.device, dtype=torch.float64) * _GOLDEN % 1.0
    return whole + (places < gained - whole).long()


def _gained(kl: Float64[Tensor, "row temperature"], target: float) -> float:
    """Find by how many levels rows may be coarser so that the guard leaves their mean just below the target.

    Two levels double KL; the guard then refines the more rows the coarser all are, so that the mean grows less.
    """
    if not bool(kl.isfinite().all()):
        return 0.0
    low, high = -_MOST_GAINED, _MOST_GAINED
    for _ in range(_AIM_ROUNDS):
        middle = (low + high) / 2
        coarser = kl * 2.0 ** (middle / 2)
        left = (coarser * 2.0 ** (-_too_far(coarser, target) / 2)[:, None]).mean(dim=0).amax()
        low, high = (middle, high) if float(left) <= _AIM * target else (low, middle)
    return low


def _finest_levels(
    coordinates: Float[Tensor, "row component"], steps: Float[Tensor, " level"]
) -> Int64[Tensor, " row"]:
    """Give the finest level at which a row's codes stay within the largest one; 0 where none does."""
    reach = coordinates.abs().amax(dim=1) / (steps[0] * LARGEST_CODE)
    levels = (-LEVELS_PER_OCTAVE * reach.double().clamp(min=1e-300).log2()).floor()
    return levels.nan_to_num(nan=0).clamp(0, NUM_LEVELS - 1).to(torch.int64)


def _measured(rows: SpectralRows, index: Tensor, quantised: Tensor, steps: Tensor, target: float) -> RowErrors:
    """Measure rows, and those again, exactly, of which it is in doubt whether they exceed twice the target."""
    errors = rows.errors(index, quantised, steps)
    doubtful = (_is_too_far(errors.kl_ceiling, target) & ~_is_too_far(errors.kl, target)).nonzero()[:, 0]
    if len(doubtful):
        errors.put(doubtful, rows.exact_errors(index[doubtful], quantised[doubtful], steps[doubtful]))
    return errors


def _ceiling_in_words(errors: RowErrors, row: int) -> str:
    ceiling, kl = float(errors.kl_ceiling[row].amax()), float(errors.kl[row].amax())
    return f"{kl:.3g}" if ceiling <= 1.01 * kl else f"{kl:.3g} as measured, and up to {ceiling:.3g} with all rounding"


def mean_after_guard(errors: RowErrors, target: float) -> Float64[Tensor, ""]:
    """Give the mean that is left once the rows above twice the target are refined, largest over temperatures.

    A level takes KL down by a factor of the square root of 2.
    """
    finer = _too_far(errors.kl, target)
    left: Tensor = _with_doubt(errors) * 2.0 ** (-finer / 2)[:, None]
    return left.mean(dim=0).amax().clamp(min=1e-12)


def rounded(
    coordinates: Float[Tensor, "row component"], steps: Float[Tensor, "row 1"]
) -> Int32[Tensor, "row component"]:
    """Quantise; what lies beyond the largest code becomes it, which the guard then finds out."""
    return (coordinates / steps).round().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int32)


def refuse_far(quantised: Int[Tensor, "row component"]) -> None:
    """Refuse rows that reach the largest code, where no guard would measure them.

    Raises
    ------
    CodecError
        Names the row.
    """
    # what is no number becomes the least integer, of which the magnitude overflows
    far = ((quantised >= LARGEST_CODE) | (quantised <= -LARGEST_CODE)).any(dim=1)
    if bool(far.any()):
        raise CodecError(
            f"Row {int(far.nonzero()[0])} lies more than {LARGEST_CODE} steps along a component: it is far "
            "from the pilot's rows. Use a larger step, a pilot that holds such rows, or Codes(). "
            "None of these rows was encoded."
        )


def _with_doubt(errors: RowErrors) -> Float64[Tensor, "row temperature"]:
    """Give KL and what its mean may be off by: three standard errors, a ceiling being two deviations away."""
    doubt: Tensor = (errors.kl_ceiling - errors.kl) * (1.5 / len(errors.kl) ** 0.5)
    return errors.kl + doubt


def _is_too_far(kl: Tensor, target: float) -> Bool[Tensor, " row"]:
    too_far: Tensor = (kl.amax(dim=1) <= GUARD_FACTOR * target).logical_not()  # NaN is too far
    return too_far


def _too_far(kl: Tensor, target: float) -> Int64[Tensor, " row"]:
    """Say by how many levels the rows above twice the target are to be refined."""
    excess = (kl.amax(dim=1) / (GUARD_FACTOR * target)).nan_to_num(nan=torch.inf)
    levels = (2 * (_MARGIN * excess).clamp(min=1e-12, max=2.0**NUM_LEVELS).log2()).ceil().clamp(min=1, max=NUM_LEVELS)
    return torch.where(excess > 1, levels, 0).to(torch.int64)


def _refinements(errors: RowErrors, target: float) -> Int64[Tensor, " row"]:
    """Say by how many levels each row is to be refined: all 0 where the target is met."""
    finer = _too_far(errors.kl_ceiling, target)
    if bool((finer > 0).any()):
        return finer
    kl = _with_doubt(errors)
    surplus = kl.sum(dim=0) - target * len(kl)
    place = int(surplus.argmax())
    if float(surplus[place]) <= 0:
        return finer
    values, order = kl[:, place].sort(descending=True, stable=True)
    gained = torch.cumsum(values * (1 - 2**-0.5), dim=0)
    count = min(len(order), int((gained < surplus[place]).sum()) + 1)
    finer[order[:count]] = 1
    return finer
