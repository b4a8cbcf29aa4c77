"""The teachers' side of a loss: what their mean gives for a few rows, from a cache or from logits."""

from __future__ import annotations

__all__ = ["Ensemble", "ToSoften", "check_is_comparable", "ensemble_beside", "logits_to_match", "rows_of"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.errors import OptionError
from kdcache.losses.by_formula import TEACHERS, Softened, softened, softened_mixture, softened_weights
from kdcache.losses.divergences import Divergence, needs_every_class
from kdcache.soft_targets import (
    Mean,
    SoftTargets,
    Weights,
    log_mean_probabilities,
    mean_logits,
    normalised_weights,
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
    """Teachers of some rows with their mean chosen, from a cache or from logits; see `ensemble_beside`."""

    source: SoftTargets | Float[Tensor, "row teacher class"]
    mean: Mean
    weights: Weights | None
    teachers: Sequence[str] | None

    def compared(self, divergence: Divergence, temperature: float) -> Float[Tensor, "row class"]:
        """Give what the divergence compares the student with: logits for logit matching, else log-probabilities."""
        return self._logits() if divergence == "logit-matching" else self._log_probabilities(temperature)

    def to_soften(self, temperature: float) -> ToSoften:
        """Give what is left to be softened, and averaged, at a temperature; of these rows all at once."""
        is_sampled = isinstance(self.source, SoftTargets) and self.source.is_sampled(self.teachers)
        if is_sampled or (self.mean == "tempered-arithmetic" and self.num_teachers > 1):
            return ToSoften((self._log_probabilities(temperature),), 1.0, is_sampled=is_sampled)
        is_mixture = self.mean == "arithmetic" and self.num_teachers > 1
        if isinstance(self.source, SoftTargets):
            if is_mixture:
                members, weights = self.source.members(temperature, weights=self.weights, teachers=self.teachers)
                return ToSoften(members.unbind(1), temperature, weights)
            logits = self.source.mean_logits(temperature=temperature, weights=self.weights, teachers=self.teachers)
            return ToSoften((logits,), temperature, is_own=True)
        if is_mixture:
            return ToSoften(self.source.unbind(1), temperature, normalised_weights(self._in_order, self.num_teachers))
        if self.num_teachers == 1 and self.weights is None:
            return ToSoften((self.source[:, 0],), temperature)
        return ToSoften((mean_logits(self.source, weights=self._in_order),), temperature)

    def row_blocks(self, rows: Tensor | None = None) -> Iterator[tuple[slice, Ensemble]]:
        """Cut into blocks of consecutive rows, as `SoftTargets.row_blocks` does; nothing is copied.

        Parameters
        ----------
        rows : Tensor [row], optional
            Plain logits have more rows, and these are meant.

        Yields
        ------
        slice
            Places among the rows that are meant.
        Ensemble
            The same teachers of these rows.
        """
        if isinstance(self.source, SoftTargets):
            for block, source in self.source.row_blocks():
                yield block, replace(self, source=source)
            return
        num_rows, num_teachers, num_classes = self.source.shape
        num_meant = num_rows if rows is None else len(rows)
        for block in softened_blocks(num_meant, num_teachers * num_classes, self.source.device):
            yield block, replace(self, source=rows_of(self.source, block if rows is None else rows[block]))

    def of_rows(self, rows: Tensor) -> Ensemble:
        """Give plain logits of some rows; soft targets from a cache are selected already."""
        return self if isinstance(self.source, SoftTargets) else replace(self, source=rows_of(self.source, rows))

    @property
    def num_teachers(self) -> int:
        """Teachers that are averaged."""
        if isinstance(self.source, SoftTargets):
            return len(self.source.codes if self.teachers is None else self.teachers)
        return self.source.shape[1]

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


@dataclass(frozen=True)
class ToSoften:
    """Soft targets before their softmax and their arithmetic mean.

    Parameters
    ----------
    members : sequence of Tensor [row, class]
        Logits; of one teacher, or of several whose arithmetic mean is meant. Or log-weights of one.
    temperature : float
        What the logits are divided by.
    weights : sequence of float [teacher], optional
        Of several teachers; they sum to 1.
    is_sampled : bool, default False
        Whether they are log-weights that are right on average, used as they are.
    is_own : bool, default False
        Whether the logits, of one teacher, may be overwritten: they were made for this alone.
    """

    members: Sequence[Float[Tensor, "row class"]]
    temperature: float
    weights: Sequence[float] = ()
    is_sampled: bool = False
    is_own: bool = False

    def __getitem__(self, rows: slice) -> ToSoften:
        return replace(self, members=[member[rows] for member in self.members])

    def softened(self, dtype: torch.dtype) -> Softened:
        """Soften them, in this type."""
        members = [member.to(dtype) for member in self.members]
        if self.is_sampled:
            return softened_weights(members[0])
        if len(members) == 1:
            return softened(members[0], self.temperature, place=TEACHERS, overwrites=self.is_own)
        return softened_mixture(members, self.weights, self.temperature)


def ensemble_beside(
    device: torch.device,
    soft_targets: SoftTargets | Float[Tensor, "row teacher class"],
    divergence: Divergence,
    *,
    mean: Mean,
    weights: Weights | None,
    teachers: Sequence[str] | None,
) -> Ensemble:
    """Put the teachers of a batch on a student's device; refuse what the divergence cannot be computed from."""
    if isinstance(soft_targets, SoftTargets):
        check_is_comparable(soft_targets, divergence, mean=mean, weights=weights, teachers=teachers)
        source: SoftTargets | Tensor = soft_targets
    else:
        source = _without_names(soft_targets, weights, teachers).detach()
    if source.device != device or isinstance(source, SoftTargets):
        source = source.to(device, non_blocking=True)
    return Ensemble(source, mean, weights, teachers)


def check_is_comparable(
    soft_targets: SoftTargets,
    divergence: Divergence,
    *,
    mean: Mean,
    weights: Weights | None = None,
    teachers: Sequence[str] | None = None,
) -> None:
    """Refuse, with an `OptionError`, sampled soft targets for a divergence that needs the probability of every class.

    Raises also what `SoftTargets.log_probabilities` does of a merged cache and of names.
    """
    soft_targets.check_selection(mean=mean, weights=weights, teachers=teachers)
    if needs_every_class(divergence) and soft_targets.is_sampled(teachers):
        raise OptionError(
            f"divergence={divergence!r} needs the probability of every class, and these soft targets are sampled "
            "(codec TopK, tail='samples'): most classes of a row have weight 0, which is right on average only. Use "
            "'forward-kl' or 'cross-entropy', whose gradients stay unbiased, or build the cache with "
            "TopK(tail='class-means') or Codes()."
        )


def _without_names(logits: Tensor, weights: Weights | None, teachers: Sequence[str] | None) -> Tensor:
    if teachers is not None or isinstance(weights, Mapping):
        raise OptionError(
            "Plain teacher logits have no names: `teachers` and weights by name need a SoftTargets. "
            "Select teachers by indexing, and give weights as a sequence."
        )
    return logits


def rows_of(logits: Tensor, rows: slice | Tensor) -> Tensor:
    """Give some rows: a slice of them, or by number, which copies them."""
    return logits[rows] if isinstance(rows, slice) else logits.index_select(0, rows)
