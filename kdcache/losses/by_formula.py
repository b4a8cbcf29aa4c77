"""Forward KL, the paper's cross-entropy and the hard term of a few rows, with their gradient, by formula.

What costs time in these losses are exponentials. Here each row has one a class for the student and one for the
teachers, shared by value and gradient, where automatic differentiation takes four; at temperature 1 the hard term
shares the student's, and at 2 and 4 it squares them. They are powers of 2, which torch computes up to three times as
fast as powers of e. On a processor they are written where those of the last rows were: each thread keeps four arrays of
2^18 numbers for it, because pages of new memory cost as much as the exponentials.

After them counts how often an array of rows is gone through, 35 to 50 microseconds for 2^18 numbers: five times for
each side, three times for the divergence, twice for the gradient. Last counts every call of torch, 3 microseconds.
"""

from __future__ import annotations

__all__ = [
    "TEACHERS",
    "FormulaTerms",
    "Labels",
    "Softened",
    "losses_by_formula",
    "softened",
    "softened_mixture",
    "softened_weights",
]

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kdcache.codecs.base import BLOCK_ELEMENTS
from kdcache.soft_targets import at_least_float32

_LN_2 = math.log(2)
_SQUARINGS = {2.0: 1, 4.0: 2}
"""Temperatures t at which softmax at 1 comes from squaring 2^(x / t)."""

_PRECISE_ABOVE = 4.0
"""Temperature above which the totals' ratio comes from differences of powers, which takes two passes more.

Up to it, the rounding of the two totals, 1e-7, is at most 2e-6 of a loss in nats, times temperature^2.
"""


class Softened(NamedTuple):
    """Rows at a temperature: powers / totals are probabilities, and powers are 2^exponents."""

    exponents: Float[Tensor, "row class"]
    powers: Float[Tensor, "row class"]
    totals: Float[Tensor, "row 1"]
    inverses: Float[Tensor, "row 1"]
    """1 / totals."""
    maxima: Float[Tensor, "row 1"]
    """What has the exponent 0, before it was softened."""
    shares: Float[Tensor, "row 1"] | None = None
    """What the probabilities sum to, where that is not 1: of weights that are right on average only."""


class _KeptArrays(threading.local):
    """The arrays of this thread that are written to again and again."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.last: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def two_like(self, values: Tensor, place: int) -> tuple[Tensor, Tensor] | None:
        """Give two arrays of the shape and type of these values, those that this place always gives; None of others."""
        is_plain = type(values) is Tensor and values.device.type == "cpu"  # of its kind are all that meet there
        if not is_plain or values.numel() > BLOCK_ELEMENTS:
            return None
        key = place, values.dtype
        last = self.last.get(key)
        if last is not None and last[0].shape == values.shape:
            return last
        with torch.inference_mode(mode=False):  # what is made in it can be written to nowhere else
            if key not in self.arrays:
                first, second = torch.empty(2, BLOCK_ELEMENTS, dtype=values.dtype, device="cpu")
                self.arrays[key] = first, second
            first, second = (array[: values.numel()].view(values.shape) for array in self.arrays[key])
        self.last[key] = first, second
        return first, second


_KEPT = _KeptArrays()
_STUDENT = 0
TEACHERS = 1
"""Place of the one teacher's exponents and powers."""


def softened(
    logits: Float[Tensor, "row class"], temperature: float, *, place: int | None = None, overwrites: bool = False
) -> Softened:
    """Soften logits: powers are exp((logits - their maximum) / temperature).

    With a `place`, they lie where those of the last call with it did; the exponents where the logits were, where these
    are to be overwritten: that leaves more of the cache to the rest.
    """
    maxima, scale = logits.amax(dim=1, keepdim=True), 1 / (_LN_2 * temperature)
    kept = None if place is None else _KEPT.two_like(logits, place)
    exponents, powers = kept or (None, None)
    if overwrites:
        exponents = logits
    elif exponents is None:
        exponents = torch.empty_like(logits)
    # One pass, and a shift of the logits costs no digits: torch adds with alpha in a fused multiply-add, which rounds
    # once. The product of the maximum is rounded too, but alike for all classes of a row, and so cancels.
    torch.add(maxima * -scale, logits, alpha=scale, out=exponents)
    powers = torch.exp2(exponents, out=powers)
    totals = powers.sum(dim=1, keepdim=True)
    return Softened(exponents, powers, totals, totals.reciprocal(), maxima)


def softened_weights(log_weights: Float[Tensor, "row class"]) -> Softened:
    """Take log-weights that are right on average as they are."""
    exponents = log_weights / _LN_2
    powers = exponents.exp2()
    shares = powers.sum(dim=1, keepdim=True)
    ones = torch.ones_like(shares)
    return Softened(exponents, powers, ones, ones, torch.zeros_like(shares), shares)


def softened_mixture(
    members: Sequence[Float[Tensor, "row class"]], weights: Sequence[float], temperature: float
) -> Softened:
    """Soften each teacher's logits, and take the arithmetic mean with weights of which one at least is above 0."""
    used = [(softened(logits, temperature), weight) for logits, weight in zip(members, weights, strict=True) if weight]
    shares = [member.powers.mul_(member.inverses * weight) for member, weight in used]
    mixture = shares[0]
    for share in shares[1:]:
        mixture.add_(share)
    maxima = mixture.amax(dim=1, keepdim=True)
    powers = mixture.div_(maxima)  # logarithms near 0 keep their digits
    totals = powers.sum(dim=1, keepdim=True)
    return Softened(powers.log2(), powers, totals, totals.reciprocal(), maxima)


@dataclass(frozen=True)
class Labels:
    """Labels of a few rows.

    Parameters
    ----------
    classes : Tensor [row]
        -100 in rows that have none.
    unlabelled : Tensor [row], optional
        Which rows have none, where any may.
    """

    classes: Int64[Tensor, " row"]
    unlabelled: Bool[Tensor, " row"] | None

    def __getitem__(self, rows: slice) -> Labels:
        return Labels(self.classes[rows], None if self.unlabelled is None else self.unlabelled[rows])

    @property
    def indices(self) -> Int64[Tensor, "row 1"]:
        """Columns of the labels; of rows that have none the first."""
        return (self.classes if self.unlabelled is None else self.classes.masked_fill(self.unlabelled, 0))[:, None]


class FormulaTerms(NamedTuple):
    """What is computed of a few rows.

    Parameters
    ----------
    temperature : float
        Of the soft term.
    is_divergence : bool
        Whether the soft term is KL and not the cross-entropy.
    soft_scale, hard_scale : float or Tensor [row, 1]
        What the terms are multiplied by; the soft term by temperature^2 besides.
    labels : Labels, optional
        Of the hard term, where there is one.
    """

    temperature: float
    is_divergence: bool
    soft_scale: float | Float[Tensor, "row 1"]
    hard_scale: float | Float[Tensor, "row 1"]
    labels: Labels | None


def losses_by_formula(
    student_logits: Float[Tensor, "row class"],
    teachers: Softened | None,
    terms: FormulaTerms,
    gradient: Float[Tensor, "row class"] | None,
) -> Float[Tensor, " row"]:
    """Give the rows' losses, and write into `gradient`, where there is one, that of their sum.

    With student q, soft targets p that sum to s, both at the temperature T, and the student q_1 at temperature 1, the
    gradient with respect to the logits is soft_scale T (s q - p) + hard_scale (q_1 - onehot).

    Parameters
    ----------
    student_logits : Tensor [row, class]
        Of any floating-point type; raised to float32 at least.
    teachers : Softened, optional
        Soft targets of the same rows, in the raised type; used up. There is no soft term where absent.
    terms : FormulaTerms
        Soft and hard term.
    gradient : Tensor [row, class], optional
        Of any floating-point type.

    Returns
    -------
    Tensor [row]
        In the raised type.
    """
    logits = at_least_float32(student_logits)
    student = softened(logits, 1.0 if teachers is None else terms.temperature, place=_STUDENT)
    losses, hard = None, None
    if terms.labels is not None:
        at_one = student if teachers is None else _at_temperature_one(student, logits, terms.temperature)
        losses = _hard_values(logits, at_one, terms.labels).mul_(terms.hard_scale)
        hard = _HardSlope(at_one, terms.labels, terms.hard_scale)
    if teachers is not None:
        compare = _divergences if terms.is_divergence else _cross_entropies
        values = compare(student, teachers, terms.temperature).mul_(terms.soft_scale * terms.temperature**2)
        losses = values if losses is None else losses.add_(values)
    if gradient is not None:
        raised = gradient if gradient.dtype == logits.dtype else torch.empty_like(student.powers)
        _write_gradient(raised, student, teachers, terms.soft_scale * terms.temperature, hard)
        if raised is not gradient:
            gradient.copy_(raised)
    return student.totals.new_zeros(len(logits)) if losses is None else losses[:, 0]


class _HardSlope(NamedTuple):
    student: Softened
    labels: Labels
    scale: float | Tensor


def _at_temperature_one(student: Softened, logits: Tensor, temperature: float) -> Softened:
    if temperature == 1:
        return student
    if temperature not in _SQUARINGS:
        return softened(logits, 1.0)
    powers = student.powers.square()
    for _ in range(_SQUARINGS[temperature] - 1):
        powers.square_()
    totals = powers.sum(dim=1, keepdim=True)
    return Softened(student.exponents, powers, totals, totals.reciprocal(), student.maxima)


def _hard_values(logits: Tensor, at_one: Softened, labels: Labels) -> Tensor:
    values = at_one.totals.log() + (at_one.maxima - logits.gather(1, labels.indices))
    return values if labels.unlabelled is None else values.masked_fill_(labels.unlabelled[:, None], 0)


def _divergences(student: Softened, teachers: Softened, temperature: float) -> Tensor:
    dots = _weighted_sums(teachers.powers, teachers.exponents.sub_(student.exponents))
    if teachers.shares is not None:
        return dots.mul_(_LN_2) + 1 - teachers.shares + teachers.shares * student.totals.log()
    if temperature <= _PRECISE_ABOVE:
        logarithms = (student.totals * teachers.inverses).log_()
    else:
        differences = torch.sub(student.powers, teachers.powers, out=teachers.exponents).sum(dim=1, keepdim=True)
        logarithms = differences.mul_(teachers.inverses).log1p_()
    return logarithms.addcmul_(dots, teachers.inverses, value=_LN_2)


def _cross_entropies(student: Softened, teachers: Softened, temperature: float) -> Tensor:  # noqa: ARG001 - as above
    dots = _weighted_sums(teachers.powers, student.exponents)
    logarithms = student.totals.log()
    if teachers.shares is not None:
        logarithms.mul_(teachers.shares)
    return logarithms.addcmul_(dots, teachers.inverses, value=-_LN_2)


def _weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
    """Give the rows' sums of weights * values, 0 where a weight is 0; overwrites the values."""
    products = values.mul_(weights)
    if weights.device.type == "cpu":  # elsewhere looking would wait for the device
        sums = products.sum(dim=1, keepdim=True)
        if math.isfinite(sums.sum()):
            return sums
    return products.masked_fill_(weights == 0, 0).sum(dim=1, keepdim=True)  # of masked classes: 0 * infinity


def _write_gradient(
    gradient: Tensor, student: Softened, teachers: Softened | None, soft: float | Tensor, hard: _HardSlope | None
) -> None:
    is_shared = hard is not None and hard.student is student
    if teachers is None:
        scales = student.inverses * hard.scale if hard is not None else torch.zeros_like(student.inverses)
        torch.mul(student.powers, scales, out=gradient)
    else:
        slopes = soft if teachers.shares is None else soft * teachers.shares
        own = student.powers.mul_(student.inverses * (slopes + hard.scale if hard and is_shared else slopes))
        # a number goes in as `value`: a column times a number is two calls, of which one makes a tensor of it
        shares, value = (teachers.inverses, -soft) if isinstance(soft, float) else (teachers.inverses * soft, -1)
        torch.addcmul(own, teachers.powers, shares, value=value, out=gradient)
    if hard is not None:
        if not is_shared:
            gradient.addcmul_(hard.student.powers, hard.student.inverses * hard.scale)
        indices = hard.labels.indices
        gradient.scatter_(1, indices, gradient.gather(1, indices) - hard.scale)
