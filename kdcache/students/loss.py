"""The loss of many students at once, each with its own temperature and soft weight.

The same numbers as one `kdcache.losses.distillation_loss` a student, in a few operations for all of them: the soft
targets are decoded once a batch (for a codec that depends on the temperature once a temperature) and softened once a
temperature. Students share no parameters, so the sum of their losses has the gradients of each.
"""

from __future__ import annotations

__all__ = ["LossParts", "SideBySideLoss"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from kdcache.errors import MergedCacheError, ShapeError
from kdcache.losses import Divergence, logit_matching_loss, logits_to_match
from kdcache.losses.divergences import check_beta, divergence_between
from kdcache.losses.ensemble import check_is_comparable
from kdcache.soft_targets import Mean, SoftTargets, at_least_float32, log_mean_probabilities, mean_logits
from kdcache.students.lineup import StudentSettings


class LossParts(NamedTuple):
    """Losses of one batch, means over its rows.

    `total` [student] is what is minimised; `soft` and `hard` [student] are its two terms before weighting, the soft one
    with its factor temperature^2, and NaN for the students that do not have that term.
    """

    total: Float[Tensor, " student"]
    soft: Float[Tensor, " student"]
    hard: Float[Tensor, " student"]


class SideBySideLoss:
    """soft_weight x temperature^2 x divergence + (1 - soft_weight) x cross-entropy with the labels, for each student.

    Parameters
    ----------
    students : sequence of StudentSettings [student]
    divergence, beta
        As in `kdcache.losses.distillation_loss`.
    mean : "geometric", "arithmetic" or "tempered-arithmetic"
        The mean over teachers.
    device : torch.device or str
        Where the logits will be.

    Notes
    -----
    Hinton, Vinyals and Dean 2015, sections 2 and 2.1: the hard term at temperature 1, the soft term times
    temperature^2 because its gradients scale as 1 / temperature^2.
    """

    def __init__(
        self,
        students: Sequence[StudentSettings],
        *,
        divergence: Divergence = "forward-kl",
        beta: float = 0.5,
        mean: Mean = "geometric",
        device: torch.device | str = "cpu",
    ) -> None:
        check_beta(beta)
        self._divergence = divergence
        self._beta = beta
        self._mean = mean
        soft = [index for index, student in enumerate(students) if student.soft_weight > 0]
        hard = [index for index, student in enumerate(students) if student.soft_weight < 1]
        own = [students[index].temperature or 1.0 for index in soft]
        self.temperatures = sorted(set(own))
        """Distinct temperatures of the soft terms."""
        self.needs_labels = bool(hard)
        self._soft = torch.tensor(soft, dtype=torch.int64, device=device)
        self._hard = torch.tensor(hard, dtype=torch.int64, device=device)
        self._own_temperature = torch.tensor(own, device=device).view(-1, 1, 1)
        groups = [self.temperatures.index(value) for value in own]
        self._group = torch.tensor(groups, dtype=torch.int64, device=device)
        self._soft_weight = torch.tensor([students[index].soft_weight for index in soft], device=device)
        self._hard_weight = torch.tensor([1 - students[index].soft_weight for index in hard], device=device)

    def __call__(
        self,
        student_logits: Float[Tensor, "student row class"],
        soft_targets: SoftTargets,
        labels: Int[Tensor, " row"] | None,
    ) -> LossParts:
        """Give each student's loss on a batch.

        Parameters
        ----------
        student_logits : Tensor [student, row, class]
            Axes between student and class are rows, in order.
        soft_targets : SoftTargets
            On the same device.
        labels : Tensor [row] int64, optional
            Needed when any student's soft weight is below 1.

        Raises
        ------
        ShapeError
            Students, soft targets and labels differ in rows or classes, or labels are missing.
        MergedCacheError
            Soft targets that keep the geometric mean only were asked for another one.
        OptionError
            Sampled soft targets were to give logits, every class's probability, or another mean of several teachers
            than the arithmetic one.
        """
        logits = at_least_float32(student_logits).flatten(1, -2)
        total = logits.new_zeros(len(logits))
        soft, hard = torch.full_like(total, torch.nan), torch.full_like(total, torch.nan)
        if self.temperatures:
            terms = self._soft_terms(logits.index_select(0, self._soft), soft_targets)
            total = total.index_add(0, self._soft, self._soft_weight * terms)
            soft[self._soft] = terms.detach()
        if self.needs_labels:
            terms = _hard_terms(logits.index_select(0, self._hard), labels)
            total = total.index_add(0, self._hard, self._hard_weight * terms)
            hard[self._hard] = terms.detach()
        return LossParts(total, soft, hard)

    def _soft_terms(self, logits: Tensor, soft_targets: SoftTargets) -> Tensor:
        if soft_targets.merge is not None and self._mean != "geometric":
            raise MergedCacheError(
                f"mean={self._mean!r} needs every teacher's logits, and this cache keeps their geometric mean only; "
                "give mean='geometric', or build a cache without merge"
            )
        if logits.shape[1] != len(soft_targets) or logits.shape[2] != soft_targets.num_classes:
            raise ShapeError(
                f"students give {logits.shape[1]} rows of {logits.shape[2]} classes, the soft targets are "
                f"{len(soft_targets)} rows of {soft_targets.num_classes} classes; a student must give one row of "
                "logits for each cached row, and the teachers' classes"
            )
        if self._divergence == "logit-matching":
            wanted = logits_to_match(soft_targets, mean=self._mean).to(logits.dtype).expand_as(logits)
            return logit_matching_loss(logits, wanted, reduction="none").mean(dim=1)
        check_is_comparable(soft_targets, self._divergence, mean=self._mean)
        log_students = torch.log_softmax(logits / self._own_temperature, dim=2)
        log_soft_targets = self._log_soft_targets(soft_targets).to(logits.dtype)
        per_row = divergence_between(self._divergence, log_students, log_soft_targets, beta=self._beta)
        return per_row.mean(dim=1) * self._own_temperature.flatten() ** 2

    def _log_soft_targets(self, soft_targets: SoftTargets) -> Tensor:
        """Soften once a temperature, and give each student its own [student, row, class]."""
        if soft_targets.depends_on_temperature:
            softened = [soft_targets.log_probabilities(value, mean=self._mean) for value in self.temperatures]
            return torch.stack(softened).index_select(0, self._group)
        teacher_logits = soft_targets.logits()
        if self._mean == "geometric":  # the mean of the logits serves all temperatures
            teacher_logits = mean_logits(teacher_logits).unsqueeze(1)
        softened = [
            log_mean_probabilities(teacher_logits, temperature=temperature, mean=self._mean)
            for temperature in self.temperatures
        ]
        return torch.stack(softened).index_select(0, self._group)


def _hard_terms(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ShapeError(
            "a student with a soft weight below 1 needs labels, and this transfer set has none; give soft_weights = "
            "[1.0], or a transfer set with labels"
        )
    num_students, num_rows, num_classes = logits.shape
    if labels.numel() != num_rows:
        raise ShapeError(f"there are {labels.numel()} labels for {num_rows} rows of students' logits")
    if labels.device.type == "cpu":  # on an accelerator the check would wait for the device at every step
        lowest, highest = (int(value) for value in labels.aminmax())
        if lowest < 0 or highest >= num_classes:
            raise ShapeError(
                f"labels range from {lowest} to {highest}; the students' classes from 0 to {num_classes - 1}"
            )
    repeated = labels.flatten().repeat(num_students)
    return functional.cross_entropy(logits.flatten(0, 1), repeated, reduction="none").view(num_students, -1).mean(dim=1)
