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

from kdcache.losses.distillation import DistillationLoss, distillation_loss
from kdcache.losses.divergences import (
    DIVERGENCES,
    Divergence,
    Reduction,
    forward_kl,
    logit_matching_loss,
    soft_cross_entropy,
)
from kdcache.losses.ensemble import logits_to_match
