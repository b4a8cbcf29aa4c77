"""The loss that a student is trained with."""

from __future__ import annotations

__all__ = ["DistillationLoss", "distillation_loss"]

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdcache.codecs.base import checked_temperature
from kdcache.errors import OptionError, ShapeError
from kdcache.losses.alignment import aligned, counted_rows, labels_beside, scales_beside, soft_targets_beside
from kdcache.losses.divergences import DIVERGENCES, REDUCTIONS, Divergence, Reduction, check_beta
from kdcache.losses.ensemble import ensemble_beside
from kdcache.losses.row_losses import RowTerms, is_followed, row_losses
from kdcache.soft_targets import MEANS, Mean, SoftTargets, Weights, check_choice


def distillation_loss(
    student_logits: Float[Tensor, "*batch class"],
    soft_targets: SoftTargets | Float[Tensor, "*batch class"] | Float[Tensor, "*batch teacher class"],
    labels: Int[Tensor, "*batch"] | None = None,
    *,
    temperature: float | Tensor,
    soft_weight: float = 0.9,
    divergence: Divergence = "forward-kl",
    beta: float = 0.5,
    mean: Mean = "geometric",
    weights: Weights | None = None,
    teachers: Sequence[str] | None = None,
    row_weights: Float[Tensor, "*batch"] | None = None,
    mask: Bool[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Distil: soft_weight * soft term + (1 - soft_weight) * cross-entropy with the labels.

    With student logits z, teacher logits v, soft targets p and q = softmax(z / temperature), the soft term of a row is

    - ``"forward-kl"``: temperature^2 KL(p || q);
    - ``"cross-entropy"``: -temperature^2 sum p log q, the paper's; same gradient, but not 0 at the optimum;
    - ``"reverse-kl"``: temperature^2 KL(q || p), infinite where q gives anything to a class that p masks;
    - ``"jensen-shannon"``: temperature^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q;
    - ``"logit-matching"``: 1/(2 N) sum ((z - mean z) - (v - mean v))^2 over the N classes that v does not mask, the
      limit of the first three's gradients as the temperature grows, and of the fourth's divided by beta (1 - beta). The
      temperature has no effect on it.

    Soft targets that are sampled (codec `TopK` with tail "samples") enter the first two as weights that are right on
    average: so are the gradients then. The value of "forward-kl" is off by a number that no student changes, and may be
    below 0. The others have no use for them.

    **Sequences.** With student logits [example, position, class], soft targets from a cache belong to the first
    positions of each example, as many as it has rows; the positions beyond are padding and left out.

    **Rows that are left out**, by `mask`, by a weight of 0 or as padding, add exactly 0 to the loss and have a gradient
    of exactly 0, whatever their logits and soft targets hold, NaN included (not where a slope of "none" is NaN). Where
    all are, the loss is 0.

    Parameters
    ----------
    student_logits : Tensor [row, class] or [example, position, class]
        Of any floating-point type; lower precision than float32 is raised to float32.
    soft_targets : SoftTargets, or Tensor [row, class] or [row, teacher, class]
        From a cache, or teacher logits (not probabilities), which get no gradient; moved to the student's device if
        need be. Of sequences, plain logits are [example, position, class] or [example, position, teacher, class]. A row
        that is not available makes its loss NaN: leave it out with ``mask=soft_targets.available``.
    labels : Tensor [row] or [example, position] of integers, optional
        Classes from 0, or `ignore_index`. Needed unless `soft_weight` is 1, and ignored then. Where they lie on an
        accelerator, their range is left for the device to check, because a check here would wait for the device at
        every step.
    temperature : float or 0-dim Tensor
        Finite, above 0.
    soft_weight : float, default 0.9
        From 0 (labels only; the soft targets are not even decoded) to 1. The default follows the paper's finding that
        the hard term wants a considerably lower weight.
    divergence : {"forward-kl", "cross-entropy", "reverse-kl", "jensen-shannon", "logit-matching"}
        The soft term; by default the paper's, less its entropy.
    beta : float, default 0.5
        Weight of the soft targets in "jensen-shannon", above 0 and below 1; see `jensen_shannon`.
    mean : {"geometric", "arithmetic", "tempered-arithmetic"}, default "geometric"
        How teachers are averaged; see `kdcache.soft_targets`. Logit matching meets, for either of the first two, the
        mean of the logits, which is where both tend as the temperature grows; and for the third the logarithm of the
        mean softmax at temperature 1. A codec that gives other logits at every temperature gives those at 1,000.
    weights : sequence of float, or mapping of teacher's name to float, optional
        Weights of the teachers, at least 0; names need a SoftTargets.
    teachers : sequence of str, optional
        Teachers to use; needs a SoftTargets.
    row_weights : Tensor [row] or [example, position], optional
        Weights of the rows: finite and at least 0, which is not looked for on an accelerator. They get no gradient.
    mask : Tensor [row] or [example, position] of bool, optional
        False leaves a row out of both terms. ``mask=labels != -100`` leaves out rows without a label.
    ignore_index : int, default -100
        The label of rows that have none, as for `torch.nn.functional.cross_entropy`: they lack the hard term, and keep
        the soft one.
    reduction : {"mean", "sum", "none"}, default "mean"
        Over rows. With weights w and losses l, "sum" is sum w l, "none" each w l, 0 in rows that are left out; and the
        mean of a term is sum w l / sum w over the rows that have it: of the hard term, those with a label.

    Returns
    -------
    Tensor [], [row] or [example, position]
        float64 for float64 student logits, else float32.

    Raises
    ------
    OptionError
        An option has a value out of its range, or names teachers of plain logits; a row's weight is negative or not
        finite; or soft targets that are sampled were to give logits, every class's probability, or another mean of
        several teachers than the arithmetic one.
    MergedCacheError
        A merged cache was asked for another mean than the geometric one, for weights or for teachers.
    ShapeError
        Student, soft targets, labels, mask and weights differ in rows, examples or classes, a label is no class, or
        labels are missing.
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
    _check_options(soft_weight, divergence, beta, mean, reduction)
    divisor = checked_temperature(temperature)
    _check_student(student_logits)
    counted = counted_rows(tuple(student_logits.shape[:-1]), mask, row_weights)
    can_select = student_logits.device.type == "cpu" and not is_followed()
    alignment = aligned(student_logits, soft_targets, counted, can_select=can_select)
    ensemble, found = None, None
    if soft_weight > 0:
        beside = soft_targets_beside(student_logits, soft_targets, alignment)
        ensemble = ensemble_beside(
            student_logits.device, beside, divergence, mean=mean, weights=weights, teachers=teachers
        )
    if soft_weight < 1:
        found = labels_beside(labels, student_logits, alignment, soft_weight=soft_weight, ignore_index=ignore_index)
    scales = scales_beside(student_logits, alignment, row_weights, found, soft_weight=soft_weight, reduction=reduction)
    terms = RowTerms(ensemble, found, divisor, divergence, beta, scales, alignment)
    rows = student_logits if student_logits.ndim == 2 else student_logits.flatten(0, -2)
    losses = row_losses(rows, terms, is_summed=reduction != "none")
    return losses.view(alignment.shape) if reduction == "none" else losses


class DistillationLoss(nn.Module):
    """`distillation_loss` as a module that holds the options.

    Parameters
    ----------
    temperature, soft_weight, divergence, beta, mean, weights, teachers, ignore_index, reduction
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
        beta: float = 0.5,
        mean: Mean = "geometric",
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(soft_weight, divergence, beta, mean, reduction)
        self.temperature = checked_temperature(temperature)
        self.soft_weight = soft_weight
        self.divergence = divergence
        self.beta = beta
        self.mean = mean
        self.weights = weights
        self.teachers = teachers
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        student_logits: Float[Tensor, "*batch class"],
        soft_targets: SoftTargets | Float[Tensor, "*batch class"] | Float[Tensor, "*batch teacher class"],
        labels: Int[Tensor, "*batch"] | None = None,
        *,
        row_weights: Float[Tensor, "*batch"] | None = None,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Give the loss of a batch; parameters, result and errors are those of `distillation_loss`."""
        return distillation_loss(
            student_logits,
            soft_targets,
            labels,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            divergence=self.divergence,
            beta=self.beta,
            mean=self.mean,
            weights=self.weights,
            teachers=self.teachers,
            row_weights=row_weights,
            mask=mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options in the module's repr."""
        names = ("temperature", "soft_weight", "divergence", "mean", "weights", "teachers", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _check_student(student_logits: Tensor) -> None:
    if not isinstance(student_logits, Tensor):
        raise ShapeError(
            f"The student's logits are a {type(student_logits).__qualname__}, not a tensor; the order is "
            "distillation_loss(student_logits, soft_targets, labels, temperature=...)."
        )
    if student_logits.ndim not in {2, 3} or not student_logits.is_floating_point():
        raise ShapeError(
            f"The student's logits must be floating-point numbers with the axes [row, class] or [example, position, "
            f"class], got {student_logits.dtype} of shape {tuple(student_logits.shape)}."
        )


def _check_options(soft_weight: float, divergence: str, beta: float, mean: str, reduction: str) -> None:
    if not 0 <= soft_weight <= 1:
        raise OptionError(f"soft_weight must lie between 0 and 1, got {soft_weight!r}.")
    check_choice("divergence", divergence, DIVERGENCES)
    check_beta(beta)
    check_choice("mean", mean, MEANS)
    check_choice("reduction", reduction, REDUCTIONS)
