"""The loss that a student is trained with."""

from __future__ import annotations

__all__ = ["DistillationLoss", "distillation_loss"]

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdcache.codecs.base import checked_temperature
from kdcache.errors import OptionError, ShapeError
from kdcache.losses.divergences import DIVERGENCES, REDUCTIONS, Divergence, Reduction, reduced
from kdcache.losses.ensemble import ensemble_beside
from kdcache.losses.row_losses import RowTerms, row_losses
from kdcache.soft_targets import MEANS, Mean, SoftTargets, Weights, check_choice


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
    has_soft_term, has_hard_term = soft_weight > 0, soft_weight < 1
    terms = RowTerms(
        ensemble_beside(student_logits, soft_targets, mean=mean, weights=weights, teachers=teachers)
        if has_soft_term
        else None,
        _classes(student_logits, labels, soft_weight) if has_hard_term else None,
        divisor,
        soft_weight,
        divergence,
    )
    return reduced(row_losses(student_logits, terms), reduction)


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
    check_choice("reduction", reduction, REDUCTIONS)


def _classes(student: Tensor, labels: Tensor | None, soft_weight: float) -> Tensor:
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
    return classes


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        return
    lowest, highest = (int(value) for value in labels.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ShapeError(
            f"Labels range from {lowest} to {highest}, the student's {num_classes} classes from 0 to "
            f"{num_classes - 1}. Rows without a label need soft_weight=1.0, or must be left out."
        )
