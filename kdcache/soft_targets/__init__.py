"""Soft targets: probabilities at a temperature, over one teacher or the mean of an ensemble.

Three means hide in "any temperature of an ensemble" (Hinton, Vinyals and Dean 2015, section 5.1, offers the first two),
and each has its name here:

- ``"geometric"``: softmax(sum_e w_e z_e / temperature), the normalised geometric mean of the members' soft targets.
- ``"arithmetic"``: sum_e w_e softmax(z_e / temperature), the arithmetic mean at the temperature asked for.
- ``"tempered-arithmetic"``: softmax(log(sum_e w_e softmax(z_e)) / temperature), the arithmetic mean at temperature 1,
  softened afterwards.

With one teacher the three are the same.

A cache of codec `TopK(tail="samples")` holds *log-weights* instead: log (p / probability of being kept) for the few
classes of a row that are kept, already over the exact partition function, and -inf for all others. Their weights are
unbiased at every temperature as they are, and a softmax would spoil that, so they are never normalised: a row sums to
1 on average only. Of the means, the arithmetic one alone keeps them unbiased; the other two are refused.

A *masked class*, with a logit of -inf, has the probability 0. The geometric mean masks a class that any member of
weight above 0 masks; the arithmetic means only one that all of them mask. Where members leave no class that all of them
allow, there is no geometric mean, and the row is NaN.
"""

from __future__ import annotations

__all__ = [
    "MEANS",
    "Mean",
    "SoftTargets",
    "Weights",
    "at_least_float32",
    "check_choice",
    "log_mean_probabilities",
    "mean_logits",
    "normalised_weights",
    "soften",
    "softened_blocks",
    "softened_elements",
]

from kdcache.soft_targets.batch import SoftTargets
from kdcache.soft_targets.means import (
    MEANS,
    Mean,
    at_least_float32,
    check_choice,
    log_mean_probabilities,
    mean_logits,
    normalised_weights,
    soften,
    softened_blocks,
    softened_elements,
)
from kdcache.soft_targets.selection import Weights
