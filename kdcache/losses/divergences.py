"""What is compared, row by row: distributions, or logits."""

from __future__ import annotations

__all__ = [
    "DIVERGENCES",
    "REDUCTIONS",
    "Divergence",
    "Reduction",
    "check_beta",
    "divergence_between",
    "forward_kl",
    "jensen_shannon",
    "logit_matching_loss",
    "needs_every_class",
    "reduced",
    "reverse_kl",
    "soft_cross_entropy",
]

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.errors import OptionError, ShapeError
from kdcache.soft_targets import at_least_float32, check_choice

Divergence = Literal["forward-kl", "cross-entropy", "reverse-kl", "jensen-shannon", "logit-matching"]
"""Name of a soft term."""

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
"""All names of soft terms."""

Reduction = Literal["mean", "sum", "none"]
"""What becomes of the rows' losses."""

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
"""All names of reductions."""


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


def reverse_kl(
    log_student: Float[Tensor, "*batch class"], log_soft_targets: Float[Tensor, "*batch class"]
) -> Float[Tensor, "*batch"]:
    """Give KL(q || p) over the last axis from log p (soft targets) and log q (student), in nats.

    Summed as p - q + q (log q - log p), for the reason that `forward_kl` gives. Where q is 0, the term is p. Where p
    is 0 and q is not, the divergence is infinite and its gradient NaN: the student must mask what the soft targets do.

    Parameters
    ----------
    log_student : Tensor [..., class]
        Normalised log-probabilities; -inf for a class that the student masks.
    log_soft_targets : Tensor [..., class]
        Normalised log-probabilities; -inf for a masked class.

    Returns
    -------
    Tensor [...]
        Not multiplied by temperature^2.

    References
    ----------
    Gu, Dong, Wei and Huang, MiniLLM: Knowledge Distillation of Large Language Models, 2024, section 2.1.
    """
    student = log_student.exp()
    log_ratios = (log_student - log_soft_targets).masked_fill(log_student.isneginf(), 0)
    return (log_soft_targets.exp() - student + student * log_ratios).sum(dim=-1)


def jensen_shannon(
    log_student: Float[Tensor, "*batch class"], log_soft_targets: Float[Tensor, "*batch class"], *, beta: float = 0.5
) -> Float[Tensor, "*batch"]:
    """Give beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, in nats.

    The generalised Jensen-Shannon divergence: at most H(beta) = -beta log beta - (1 - beta) log(1 - beta), whatever is
    masked. Divided by beta it tends to KL(p || q) as beta goes to 0, and divided by 1 - beta to KL(q || p) as beta goes
    to 1; at 0 and 1 themselves it is 0. For p near q it is beta (1 - beta) KL(p || q).

    Computed from y = log q - log p. With w = 1 - beta where y <= 0, else beta, and a = log(1 - w + w exp(-|y|)),
    log(m / p) is a + max(y, 0) and log(m / q) is a + max(-y, 0): exact for small y, without overflow for large.

    Parameters
    ----------
    log_student : Tensor [..., class]
        log q, normalised; -inf for a masked class.
    log_soft_targets : Tensor [..., class]
        log p, normalised; -inf for a masked class.
    beta : float, default 0.5
        Weight of p, between 0 and 1. At the default, p and q change places without effect.

    Returns
    -------
    Tensor [...]
        Not multiplied by temperature^2.

    Raises
    ------
    OptionError
        `beta` is not between 0 and 1.

    References
    ----------
    Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, 2024, section 2.
    """
    check_beta(beta)
    soft_targets, student = log_soft_targets.exp(), log_student.exp()
    has_neither = log_soft_targets.isneginf() & log_student.isneginf()
    log_ratios = (log_student - log_soft_targets).masked_fill(has_neither, 0)
    is_low = log_ratios <= 0
    below = log_ratios.clamp(max=0).expm1().mul(1 - beta).log1p()
    above = log_ratios.clamp(min=0).neg().expm1().mul(beta).log1p()
    logarithms = torch.where(is_low, below, above)
    finite = log_ratios.masked_fill(log_ratios.isinf(), 0)  # an infinite one comes with a probability of 0
    own = soft_targets * (logarithms + finite.masked_fill(is_low, 0))
    others = student * (logarithms - finite.masked_fill(~is_low, 0))
    return -(beta * own + (1 - beta) * others).sum(dim=-1)


def divergence_between(
    divergence: Divergence,
    log_student: Float[Tensor, "*batch class"],
    log_soft_targets: Float[Tensor, "*batch class"],
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Give the divergence of this name; logit matching is none of two distributions."""
    if divergence == "jensen-shannon":
        return jensen_shannon(log_student, log_soft_targets, beta=beta)
    compare = {"forward-kl": forward_kl, "cross-entropy": soft_cross_entropy, "reverse-kl": reverse_kl}[divergence]
    return compare(log_student, log_soft_targets)


def needs_every_class(divergence: Divergence) -> bool:
    """Tell whether a divergence is of probabilities, and of no use for weights that are right on average only.

    The others are linear in the soft targets, up to a number that no student changes.
    """
    return divergence in {"reverse-kl", "jensen-shannon"}


def check_beta(beta: float) -> None:
    """Refuse what is no weight of the Jensen-Shannon divergence with an `OptionError`."""
    if not 0 < beta < 1:
        raise OptionError(
            f"beta must lie between 0 and 1, got {beta!r}. At 0 and 1 the Jensen-Shannon divergence is 0 whatever the "
            "student says; its limits there, divided by beta or by 1 - beta, are divergence='forward-kl' and "
            "'reverse-kl'."
        )


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
    >>> import torch
    >>> logit_matching_loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[12.0, 8.0]]))
    tensor(0.5000)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"The student's logits have the shape {tuple(student_logits.shape)}, "
            f"the teacher's {tuple(teacher_logits.shape)}; they must be equal."
        )
    is_masked = teacher_logits.isneginf()
    num_classes = is_masked.logical_not().sum(dim=-1)
    differences = (at_least_float32(student_logits) - at_least_float32(teacher_logits)).masked_fill_(is_masked, 0)
    centred = (differences - (differences.sum(dim=-1) / num_classes)[..., None]).masked_fill_(is_masked, 0)
    return reduced(centred.square().sum(dim=-1) / (2 * num_classes), reduction)


def reduced(losses: Float[Tensor, "*batch"], reduction: Reduction) -> Float[Tensor, "*reduced"]:
    """Give the rows' losses, their mean or their sum."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
