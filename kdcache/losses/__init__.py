"""Distillation losses: a student's logits against soft targets, and against labels.

The *soft term* compares the student with the soft targets at a temperature, times temperature^2; the *hard term* is
the cross-entropy with the labels at temperature 1. Their gradients keep their relative size when the temperature
changes (Hinton, Vinyals and Dean 2015, section 2).

A class that the soft targets mask, with a logit of -inf, has the probability 0; logit matching leaves it out. The
student may mask the same class. If it masks one alone to which the soft targets give a probability, forward KL and the
cross-entropy are infinite, and logit matching NaN; reverse KL and Jensen-Shannon are finite. If the soft targets mask
one to which the student gives a probability, reverse KL is infinite and the other soft terms finite.
"""

from __future__ import annotations

__all__ = [
    "DIVERGENCES",
    "DistillationLoss",
    "Divergence",
    "Reduction",
    "distillation_loss",
    "forward_kl",
    "jensen_shannon",
    "logit_matching_loss",
    "logits_to_match",
    "reverse_kl",
    "soft_cross_entropy",
]

from kdcache.losses.distillation import DistillationLoss, distillation_loss
from kdcache.losses.divergences import (
    DIVERGENCES,
    Divergence,
    Reduction,
    forward_kl,
    jensen_shannon,
    logit_matching_loss,
    reverse_kl,
    soft_cross_entropy,
)
from kdcache.losses.ensemble import logits_to_match
