"""The teachers' side of a loss: what their mean gives for a few rows, from a cache or from logits."""

from __future__ import annotations

__all__ = ["Ensemble", "ensemble_beside", "logits_to_match"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from kdcache.errors import OptionError, ShapeError
from kdcache.losses.divergences import Divergence
from kdcache.soft_targets import (
    Mean,
    SoftTargets,
    Weights,
    log_mean_probabilities,
    mean_logits,
    softened_blocks,
)

_HIGH_TEMPERATURE = 1000.0


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


@dataclass(frozen=True)
class Ensemble:
    """Teachers of a batch with their mean chosen, from a cache or from logits; see `ensemble_beside`."""

    source: SoftTargets | Float[Tensor, "row teacher class"]
    mean: Mean
    weights: Weights | None
    teachers: Sequence[str] | None

    def compared(self, divergence: Divergence, temperature: float) -> Float[Tensor, "row class"]:
        """Give what the divergence compares the student with: logits for logit matching, else log-probabilities."""
        return self._logits() if divergence == "logit-matching" else self._log_probabilities(temperature)

    def row_blocks(self) -> Iterator[tuple[slice, Ensemble]]:
        """Cut into blocks of consecutive rows, as `SoftTargets.row_blocks` does; nothing is copied."""
        if isinstance(self.source, SoftTargets):
            for rows, block in self.source.row_blocks():
                yield rows, replace(self, source=block)
        else:
            num_rows, num_teachers, num_classes = self.source.shape
            for rows in softened_blocks(num_rows, num_teachers * num_classes, self.source.device):
                yield rows, replace(self, source=self.source[rows])

    def _log_probabilities(self, temperature: float) -> Tensor:
        if isinstance(self.source, SoftTargets):
            return self.source.log_probabilities(
                temperature, mean=self.mean, weights=self.weights, teachers=self.teachers
            )
        return log_mean_probabilities(self.source, temperature=temperature, mean=self.mean, weights=self._in_order)

    def _logits(self) -> Tensor:
        if isinstance(self.source, SoftTargets):
            return logits_to_match(self.source, mean=self.mean, weights=self.weights, teachers=self.teachers)
        if self.mean == "tempered-arithmetic":
            return self._log_probabilities(1.0)
        return mean_logits(self.source, weights=self._in_order)

    @property
    def _in_order(self) -> Sequence[float] | None:
        return None if isinstance(self.weights, Mapping) else self.weights


def ensemble_beside(
    student_logits: Float[Tensor, "row class"],
    soft_targets: SoftTargets | Float[Tensor, "row class"] | Float[Tensor, "row teacher class"],
    *,
    mean: Mean,
    weights: Weights | None,
    teachers: Sequence[str] | None,
) -> Ensemble:
    """Put the teachers of a batch beside a student, on its device; refuse other rows or classes than its own."""
    if isinstance(soft_targets, SoftTargets):
        source: SoftTargets | Tensor = soft_targets.to(student_logits.device, non_blocking=True)
        found = (len(soft_targets), soft_targets.num_classes)
    else:
        source = _members(soft_targets, weights, teachers).to(student_logits.device, non_blocking=True)
        found = (source.shape[0], source.shape[-1])
    if found != tuple(student_logits.shape):
        raise ShapeError(
            f"The student gives {student_logits.shape[0]} rows of {student_logits.shape[1]} classes, the soft targets "
            f"are {found[0]} rows of {found[1]} classes. "
            "A student needs one row a cached row, and the teachers' classes."
        )
    return Ensemble(source, mean, weights, teachers)


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
