"""Distillation losses: a student's logits against soft targets, and against labels.

The *soft term* compares the student with the soft targets at a temperature, times temperature^2; the *hard term* is
the cross-entropy with the labels at temperature 1. Their gradients keep their relative size when the temperature
changes (Hinton, Vinyals and Dean 2015, section 2).

A class that the soft targets mask, with a logit of -inf, has the probability 0; logit matching leaves it out. The
student may mask the same class. If it masks one alone to which the soft targets give a probability, the soft term is
infinite, and that of logit matching NaN.
"""

from __future__ import annotations

__all__ = [
    "DIVERGENCES",
    "DistillationLoss",
    "Divergence",
    "Reduction",
    "distillation_loss",
    "forward_kl",
    "logit_matching_loss",
    "logits_to_match",
    "soft_cross_entropy",
]

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from kdcache.codecs.base import checked_temperature
from kdcache.errors import OptionError, ShapeError
from kdcache.soft_targets import (
    MEANS,
    Mean,
    SoftTargets,
    at_least_float32,
    check_choice,
    log_mean_probabilities,
    mean_logits,
)

Divergence = Literal["forward-kl", "cross-entropy", "logit-matching"]
"""Name of a soft term."""

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
"""All names of soft terms."""

Reduction = Literal["mean", "sum", "none"]
"""What becomes of the rows' losses."""

Weights = Sequence[float] | Mapping[str, float]

_HIGH_TEMPERATURE = 1000.0


def distillation_loss(
    student_logits: Float[Tensor, "row class"],
    soft_targets: SoftTargets | Float[Tensor, "row class"] | Float[Tensor, "row teacher class"],
    labels: Int[Tensor, " row"] | None = None,
    *,
    temperature: float | Tensor,
    soft_weight: float = 0.9,
    divergence: Divergence = "forward-kl",
    mean: Mean = "geometric",
    weights: Weights | None = None,
    teachers: Sequence[str] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Distil: soft_weight * soft term + (1 - soft_weight) * cross-entropy with the labels.

    With student logits z, teacher logits v, soft targets p and q = softmax(z / temperature), the soft term of a row is

    - ``"forward-kl"``: temperature^2 KL(p || q);
    - ``"cross-entropy"``: -temperature^2 sum p log q, the paper's; same gradient, but not 0 at the optimum;
    - ``"logit-matching"``: 1/(2 N) sum ((z - mean z) - (v - mean v))^2 over the N classes that v does not mask, the
      limit of the other two's gradients as the temperature grows. The temperature has no effect on it.

    Soft targets that are sampled (codec `TopK` with tail "samples") enter the first two as weights that are right on
    average: so are the gradients then. The value of "forward-kl" is off by a number that no student changes, and may be
    below 0. Logit matching has no use for them.

    Parameters
    ----------
    student_logits : Tensor [row, class]
        Of any floating-point type; lower precision than float32 is raised to float32.
    soft_targets : SoftTargets, or Tensor [row, class] or [row, teacher, class]
        From a cache, or teacher logits (not probabilities), which get no gradient; moved to the student's device if
        need be. A row that is not available makes its loss NaN: select with ``soft_targets.rows`` first.
    labels : Tensor [row] of integers, optional
        Classes from 0. Needed unless `soft_weight` is 1, and ignored then. Where they lie on an accelerator, their
        range is left for the device to check, because a check here would wait for the device at every step.
    temperature : float or 0-dim Tensor
        Finite, above 0.
    soft_weight : float, default 0.9
        From 0 (labels only; the soft targets are not even decoded) to 1. The default follows the paper's finding that
        the hard term wants a considerably lower weight.
    divergence : {"forward-kl", "cross-entropy", "logit-matching"}, default "forward-kl"
        The soft term.
    mean : {"geometric", "arithmetic", "tempered-arithmetic"}, default "geometric"
        How teachers are averaged; see `kdcache.soft_targets`. Logit matching meets, for either of the first two, the
        mean of the logits, which is where both tend as the temperature grows; and for the third the logarithm of the
        mean softmax at temperature 1. A codec that gives other logits at every temperature gives those at 1,000.
    weights : sequence of float, or mapping of teacher's name to float, optional
        Weights of the teachers, at least 0; names need a SoftTargets.
    teachers : sequence of str, optional
        Teachers to use; needs a SoftTargets.
    reduction : {"mean", "sum", "none"}, default "mean"
        Over rows.

    Returns
    -------
    Tensor [] or [row]
        float64 for float64 student logits, else float32.

    Raises
    ------
    OptionError
        An option has a value out of its range, or names teachers of plain logits; or soft targets that are sampled were
        to give logits, or another mean of several teachers than the arithmetic one.
    MergedCacheError
        A merged cache was asked for another mean than the geometric one, for weights or for teachers.
    ShapeError
        Student, soft targets and labels differ in rows or classes, a label is no class, or labels are missing.
    TemperatureError
        The temperature is not a finite number above 0.
    UnknownTeacherError
        A name is not of this ensemble.

    References
    ----------
    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, sections 2 and 2.1.

    Examples
    --------
    >>> student = torch.tensor([[1.0, 0.0]])
    >>> teacher = torch.tensor([[3.0, 0.0]])
    >>> distillation_loss(student, teacher, torch.tensor([0]), temperature=4.0, soft_weight=0.5)
    tensor(0.3859)
    """
    _check_options(soft_weight, divergence, mean, reduction)
    divisor = checked_temperature(temperature)
    _check_student(student_logits)
    student = at_least_float32(student_logits)
    losses = student.new_zeros(student.shape[0])
    if soft_weight > 0:
        chosen = _Ensemble(soft_targets, student, mean, weights, teachers)
        losses = losses + soft_weight * _soft_term(student, chosen, divisor, divergence)
    if soft_weight < 1:
        losses = losses + (1 - soft_weight) * _hard_term(student, labels, soft_weight)
    return _reduced(losses, reduction)


class DistillationLoss(nn.Module):
    """`distillation_loss` as a module that holds the options.

    Parameters
    ----------
    temperature, soft_weight, divergence, mean, weights, teachers, reduction
        As in `distillation_loss`; checked at once.

    Raises
    ------
    OptionError
        An option has a value out of its range.
    TemperatureError
        The temperature is not a finite number above 0.

    Examples
    --------
    >>> loss = DistillationLoss(temperature=4.0, soft_weight=1.0)
    >>> loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.)
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor,
        soft_weight: float = 0.9,
        divergence: Divergence = "forward-kl",
        mean: Mean = "geometric",
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(soft_weight, divergence, mean, reduction)
        self.temperature = checked_temperature(temperature)
        self.soft_weight = soft_weight
        self.divergence = divergence
        self.mean = mean
        self.weights = weights
        self.teachers = teachers
        self.reduction = reduction

    def forward(
        self,
        student_logits: Float[Tensor, "row class"],
        soft_targets: SoftTargets | Float[Tensor, "row class"] | Float[Tensor, "row teacher class"],
        labels: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Give the loss of a batch; parameters, result and errors are those of `distillation_loss`."""
        return distillation_loss(
            student_logits,
            soft_targets,
            labels,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            divergence=self.divergence,
            mean=self.mean,
            weights=self.weights,
            teachers=self.teachers,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options in the module's repr."""
        return (
            f"temperature={self.temperature}, soft_weight={self.soft_weight}, divergence={self.divergence!r}, "
            f"mean={self.mean!r}, weights={self.weights}, teachers={self.teachers}, reduction={self.reduction!r}"
        )


def forward_kl(
    log_student: Float[Tensor, "*batch class"], log_soft_targets: Float[Tensor, "*batch class"]
) -> Float[Tensor, "*batch"]:
    """Give KL(p || q) over the last axis from log p (soft targets) and log q (student), in nats.

    Summed as q - p - p (log q - log p): each term is at least 0, and the rounding of the two log-softmaxes cancels to
    first order. With 50,000 classes at temperature 1,000 in float32 the usual sum of p (log p - log q), multiplied by
    temperature^2, is off by 0.1; this one by 0.00001. The gradient with respect to log q is q - p, whose sum is
    0, so that the gradient of a following log-softmax is the usual one. With weights p that sum to another number s,
    that gradient is s q - p, as for the cross-entropy: unbiased where p is. Where p is 0, the term is q.

    Parameters
    ----------
    log_student : Tensor [..., class]
        Normalised log-probabilities.
    log_soft_targets : Tensor [..., class]
        Log-probabilities, or log-weights that are right on average; -inf for a class without any.

    Returns
    -------
    Tensor [...]
        Not multiplied by temperature^2.
    """
    soft_targets = log_soft_targets.exp()
    differences = (log_student - log_soft_targets).masked_fill_(soft_targets == 0, 0)  # of masked classes: infinite
    return (log_student.exp() - soft_targets - soft_targets * differences).sum(dim=-1)


def soft_cross_entropy(
    log_student: Float[Tensor, "*batch class"], log_soft_targets: Float[Tensor, "*batch class"]
) -> Float[Tensor, "*batch"]:
    """Give -sum p log q over the last axis from log p (soft targets) and log q (student), in nats.

    With log q = log-softmax(z / temperature), the gradient with respect to z is (q - p) / temperature: equation 2 of
    Hinton, Vinyals and Dean (2015). Where p is 0, so is the term.

    Parameters
    ----------
    log_student : Tensor [..., class]
        Normalised log-probabilities.
    log_soft_targets : Tensor [..., class]
        Log-probabilities, or log-weights that are right on average; -inf for a class without any.

    Returns
    -------
    Tensor [...]
        Not multiplied by temperature^2.
    """
    soft_targets = log_soft_targets.exp()
    return -(soft_targets * log_student.masked_fill(soft_targets == 0, 0)).sum(dim=-1)


def logit_matching_loss(
    student_logits: Float[Tensor, "*batch class"],
    teacher_logits: Float[Tensor, "*batch class"],
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    """Match logits: 1/(2 N) sum ((z - mean z) - (v - mean v))^2 over the N classes that the teacher does not mask.

    The limit of temperature^2 KL(softmax(v / temperature) || softmax(z / temperature)) as the temperature grows; for
    zero-meaned logits its gradient is (z - v) / N: equation 4 of Hinton, Vinyals and Dean (2015), section 2.1, times
    temperature^2.

    Parameters
    ----------
    student_logits : Tensor [..., class]
        z; a shift of a row has no effect.
    teacher_logits : Tensor [..., class]
        v, of the same shape; a shift of a row has no effect. Classes of -inf are left out of means and sum.
    reduction : {"mean", "sum", "none"}, default "mean"
        Over rows.

    Raises
    ------
    OptionError
        `reduction` is no known reduction.
    ShapeError
        The two have different shapes.

    Examples
    --------
    >>> logit_matching_loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[12.0, 8.0]]))
    tensor(0.5000)
    """
    check_choice("reduction", reduction, get_args(Reduction))
    if student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"The student's logits have the shape {tuple(student_logits.shape)}, "
            f"the teacher's {tuple(teacher_logits.shape)}; they must be equal."
        )
    is_masked = teacher_logits.isneginf()
    num_classes = is_masked.logical_not().sum(dim=-1)
    differences = (at_least_float32(student_logits) - at_least_float32(teacher_logits)).masked_fill_(is_masked, 0)
    centred = (differences - (differences.sum(dim=-1) / num_classes)[..., None]).masked_fill_(is_masked, 0)
    return _reduced(centred.square().sum(dim=-1) / (2 * num_classes), reduction)


def logits_to_match(
    soft_targets: SoftTargets,
    *,
    mean: Mean = "geometric",
    weights: Weights | None = None,
    teachers: Sequence[str] | None = None,
) -> Float[Tensor, "row class"]:
    """Give the logits that logit matching meets, up to a shift of each row.

    Logit matching is the limit of a high temperature, so a codec that gives other logits at every temperature decodes
    at 1,000: there softmax is linear to a thousandth of the logits' spread, and float32 still resolves a thousandth.

    Parameters
    ----------
    soft_targets : SoftTargets
        From a cache.
    mean, weights, teachers
        As in `distillation_loss`.

    Raises
    ------
    OptionError
        The soft targets are sampled: they have no logits.
    MergedCacheError, ShapeError, UnknownTeacherError
        As for `SoftTargets.log_probabilities`.
    """
    several = len(soft_targets.codes if teachers is None else teachers) > 1
    if mean != "geometric" and (soft_targets.merge or (mean == "tempered-arithmetic" and several)):
        return soft_targets.log_probabilities(1.0, mean=mean, weights=weights, teachers=teachers)
    return soft_targets.mean_logits(temperature=_HIGH_TEMPERATURE, weights=weights, teachers=teachers)


class _Ensemble:
    """The teachers' side of a batch, from a cache or from logits, with its mean chosen."""

    def __init__(
        self,
        soft_targets: SoftTargets | Tensor,
        student: Tensor,
        mean: Mean,
        weights: Weights | None,
        teachers: Sequence[str] | None,
    ) -> None:
        self._mean, self._weights, self._teachers = mean, weights, teachers
        if isinstance(soft_targets, SoftTargets):
            found = (len(soft_targets), soft_targets.num_classes)
            self._source: SoftTargets | Tensor = soft_targets.to(student.device, non_blocking=True)
        else:
            self._source = _members(soft_targets, weights, teachers).to(student.device, non_blocking=True)
            found = (self._source.shape[0], self._source.shape[-1])
        if found != tuple(student.shape):
            raise ShapeError(
                f"The student gives {student.shape[0]} rows of {student.shape[1]} classes, the soft targets are "
                f"{found[0]} rows of {found[1]} classes. "
                "A student needs one row a cached row, and the teachers' classes."
            )

    def log_probabilities(self, temperature: float) -> Tensor:
        if isinstance(self._source, SoftTargets):
            return self._source.log_probabilities(
                temperature, mean=self._mean, weights=self._weights, teachers=self._teachers
            )
        return log_mean_probabilities(
            self._source, temperature=temperature, mean=self._mean, weights=self._listed_weights
        )

    def logits(self) -> Tensor:
        if isinstance(self._source, SoftTargets):
            return logits_to_match(self._source, mean=self._mean, weights=self._weights, teachers=self._teachers)
        if self._mean == "tempered-arithmetic":
            return self.log_probabilities(1.0)
        return mean_logits(self._source, weights=self._listed_weights)

    @property
    def _listed_weights(self) -> Sequence[float] | None:
        return None if isinstance(self._weights, Mapping) else self._weights


def _soft_term(student: Tensor, ensemble: _Ensemble, temperature: float, divergence: Divergence) -> Tensor:
    if divergence == "logit-matching":
        return logit_matching_loss(student, ensemble.logits(), reduction="none")
    compare = forward_kl if divergence == "forward-kl" else soft_cross_entropy
    log_student = torch.log_softmax(student / temperature, dim=-1)
    return temperature**2 * compare(log_student, ensemble.log_probabilities(temperature).to(student.dtype))


def _hard_term(student: Tensor, labels: Tensor | None, soft_weight: float) -> Tensor:
    num_rows, num_classes = student.shape
    if labels is None:
        raise ShapeError(
            f"soft_weight={soft_weight} leaves {1 - soft_weight:.6g} to the labels, and there are none. "
            "Pass `labels`, or soft_weight=1.0 to learn from the soft targets alone."
        )
    if labels.shape != (num_rows,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(
            f"{num_rows} rows of student logits need as many integer labels, "
            f"got {labels.dtype} labels of shape {tuple(labels.shape)}."
        )
    classes = labels.to(student.device, torch.int64)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_labels(labels, num_classes)
    return functional.cross_entropy(student, classes, reduction="none")


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        return
    lowest, highest = (int(value) for value in labels.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ShapeError(
            f"Labels range from {lowest} to {highest}, the student's {num_classes} classes from 0 to "
            f"{num_classes - 1}. Rows without a label need soft_weight=1.0, or must be left out."
        )


def _members(logits: Tensor, weights: Weights | None, teachers: Sequence[str] | None) -> Tensor:
    if teachers is not None or isinstance(weights, Mapping):
        raise OptionError(
            "Plain teacher logits have no names: `teachers` and weights by name need a SoftTargets. "
            "Select teachers by indexing, and give weights as a sequence."
        )
    if logits.ndim not in {2, 3}:
        raise ShapeError(
            f"Teacher logits must have the axes [row, class] or [row, teacher, class], got shape {tuple(logits.shape)}."
        )
    return (logits if logits.ndim == 3 else logits[:, None]).detach()


def _check_student(student_logits: Tensor) -> None:
    if student_logits.ndim != 2 or not student_logits.is_floating_point():
        raise ShapeError(
            f"The student's logits must be floating-point numbers with the axes [row, class], got "
            f"{student_logits.dtype} of shape {tuple(student_logits.shape)}. Flatten positions into rows first."
        )


def _check_options(soft_weight: float, divergence: str, mean: str, reduction: str) -> None:
    if not 0 <= soft_weight <= 1:
        raise OptionError(f"soft_weight must lie between 0 and 1, got {soft_weight!r}.")
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("mean", mean, MEANS)
    check_choice("reduction", reduction, get_args(Reduction))


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
