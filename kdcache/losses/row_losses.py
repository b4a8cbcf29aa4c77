"""The loss of every row and its gradient, computed together in blocks of rows.

No array as large as the student's logits is made but their gradient, which a backward pass would make anyway: soft
targets are decoded block by block. The gradient of forward KL, the cross-entropy and the hard term is written down by
formula; that of the other divergences is found by autograd, within a block.
"""

from __future__ import annotations

__all__ = ["RowTerms", "is_followed", "row_losses"]

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from kdcache.losses.alignment import NO_LABEL, Alignment, Scales
from kdcache.losses.by_formula import FormulaTerms, Labels, losses_by_formula
from kdcache.losses.divergences import Divergence, divergence_between, logit_matching_loss
from kdcache.losses.ensemble import Ensemble, ToSoften, rows_of
from kdcache.soft_targets import at_least_float32, softened_blocks, softened_elements

_BY_FORMULA = frozenset({"forward-kl", "cross-entropy"})


@dataclass(frozen=True)
class RowTerms:
    """What a row's loss is made of: a scaled soft term and a scaled hard term.

    Parameters
    ----------
    ensemble : Ensemble, optional
        The teachers of the soft term, where there is one, on the student's device.
    labels : Labels, optional
        Those of the hard term, where there is one, on the student's device.
    temperature : float
        Of the soft term.
    divergence : Divergence
        The soft term.
    beta : float
        Of the Jensen-Shannon divergence.
    scales : Scales
        What the terms are multiplied by, the soft one besides its temperature^2.
    alignment : Alignment
        Which rows of the student are computed: those of the labels, of the scales and of a cached ensemble.
    """

    ensemble: Ensemble | None
    labels: Labels | None
    temperature: float
    divergence: Divergence
    beta: float
    scales: Scales
    alignment: Alignment

    def losses(self, student_logits: Float[Tensor, "row class"]) -> Float[Tensor, " row"]:
        """Give the rows' losses, all at once, in operations that autograd and compilers follow."""
        selected, left_out = self.alignment.selected, self.alignment.left_out
        student, ensemble = student_logits, self.ensemble
        if selected is not None:
            student = student.index_select(0, selected)
            ensemble = None if ensemble is None else ensemble.of_rows(selected)
        compared = None if ensemble is None else ensemble.compared(self.divergence, self.temperature)
        if left_out is not None:
            student = student.masked_fill(left_out[:, None], 0)
            compared = None if compared is None else compared.masked_fill(left_out[:, None], 0)
        losses = self._of(student, compared)
        if selected is None:
            return losses
        return losses.new_zeros(len(student_logits)).index_copy(0, selected, losses)

    def losses_in_row_blocks(
        self, student_logits: Float[Tensor, "row class"], gradient: Float[Tensor, "row class"] | None = None
    ) -> Float[Tensor, " row"]:
        """Give the rows' losses block by block, and write the gradient of their sum into `gradient` where there is one.

        Rows that are not selected have the loss 0, and their gradient is left as it is.
        """
        if self._is_one_part(student_logits):  # cutting takes as long as the loss of a small batch
            compared = None if self.ensemble is None else self._beside(self.ensemble)
            return self.part_losses(student_logits, compared, gradient)
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        losses = student_logits.new_zeros(len(student_logits), dtype=dtype)
        for rows, part, compared in self._parts(student_logits):
            chosen = rows if part.alignment.selected is None else part.alignment.selected
            student = rows_of(student_logits, chosen)
            slope = None
            if gradient is not None:
                is_view = isinstance(chosen, slice)
                slope = gradient[rows] if is_view else torch.empty_like(student, dtype=gradient.dtype)
            losses[chosen] = part.part_losses(student, compared, slope)
            if gradient is not None and slope is not None and isinstance(chosen, Tensor):
                gradient.index_copy_(0, chosen, slope)
        return losses

    def part_losses(
        self,
        student_logits: Float[Tensor, "row class"],
        compared: Float[Tensor, "row class"] | ToSoften | None,
        gradient: Float[Tensor, "row class"] | None,
    ) -> Float[Tensor, " row"]:
        """Give the losses of the few rows that these terms are of, all of them computed, as `losses_in_row_blocks`."""
        if compared is None or isinstance(compared, ToSoften):
            losses = self._by_formula(student_logits, compared, gradient)
        elif gradient is None:
            losses = self._of(student_logits, compared)
        else:
            losses = self._by_autograd(student_logits, compared, gradient)
        left_out = self.alignment.left_out
        if left_out is not None:
            losses = losses.masked_fill(left_out, 0)
            if gradient is not None:
                gradient.masked_fill_(left_out[:, None], 0)
        return losses

    def _is_one_part(self, student_logits: Tensor) -> bool:
        num_teachers = 1 if self.ensemble is None else self.ensemble.num_teachers
        is_small = student_logits.numel() * num_teachers <= softened_elements(student_logits.device)
        return self.alignment.selected is None and is_small

    def _parts(self, student_logits: Tensor) -> Iterator[tuple[slice, RowTerms, Tensor | ToSoften | None]]:
        """Cut into a few rows at a time, with what the student is compared with; soft targets are decoded once."""
        selected = self.alignment.selected
        num_rows = len(student_logits) if selected is None else len(selected)
        blocks: Iterator[tuple[slice, Ensemble | None]] = iter([(slice(0, num_rows), None)])
        if self.ensemble is not None:
            blocks = self.ensemble.row_blocks(selected)
        for block, ensemble in blocks:
            compared = None if ensemble is None else self._beside(ensemble)
            for part in softened_blocks(block.stop - block.start, student_logits.shape[1], student_logits.device):
                rows = slice(block.start + part.start, block.start + part.stop)
                terms = self if rows == slice(0, num_rows) else self._of_rows(rows)
                if compared is None or part == slice(0, block.stop - block.start):
                    yield rows, terms, compared
                else:
                    yield rows, terms, compared[part]

    def _beside(self, ensemble: Ensemble) -> Tensor | ToSoften:
        if self.divergence in _BY_FORMULA:
            return ensemble.to_soften(self.temperature)
        return ensemble.compared(self.divergence, self.temperature)

    def _of_rows(self, rows: slice) -> RowTerms:
        selected, left_out = self.alignment.selected, self.alignment.left_out
        return replace(
            self,
            labels=None if self.labels is None else self.labels[rows],
            scales=Scales(*(scale[rows] if isinstance(scale, Tensor) else scale for scale in self.scales)),
            alignment=replace(
                self.alignment,
                selected=None if selected is None else selected[rows],
                left_out=None if left_out is None else left_out[rows],
            ),
        )

    def _by_formula(self, student_logits: Tensor, compared: ToSoften | None, gradient: Tensor | None) -> Tensor:
        raised = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        teachers = None if compared is None else compared.softened(raised)
        terms = FormulaTerms(
            self.temperature, self.divergence == "forward-kl", self.scales.soft, self.scales.hard, self.labels
        )
        return losses_by_formula(student_logits, teachers, terms, gradient)

    def _by_autograd(self, student_logits: Tensor, compared: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            student = student_logits.detach().requires_grad_()
            losses = self._of(student, compared)
            (slope,) = torch.autograd.grad(losses.sum(), student)
        gradient.copy_(slope)
        return losses.detach()

    def _of(self, student_logits: Tensor, compared: Tensor | None) -> Tensor:
        student = at_least_float32(student_logits)
        losses = student.new_zeros(student.shape[0], 1)
        if compared is not None:
            losses = losses + self.scales.soft * self._soft_term(student, compared)[:, None]
        if self.labels is not None:
            hard = functional.cross_entropy(student, self.labels.classes, reduction="none", ignore_index=NO_LABEL)
            losses = losses + self.scales.hard * hard[:, None]
        return losses[:, 0]

    def _soft_term(self, student: Tensor, compared: Tensor) -> Tensor:
        if self.divergence == "logit-matching":
            return logit_matching_loss(student, compared, reduction="none")
        log_student = torch.log_softmax(student / self.temperature, dim=-1)
        log_soft_targets = compared.to(student.dtype)
        return self.temperature**2 * divergence_between(self.divergence, log_student, log_soft_targets, beta=self.beta)


def is_followed() -> bool:
    """Tell whether a compiler, `torch.func` or forward-mode differentiation follows every operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001 - torch has no public name for it
        or forward_ad._current_level >= 0  # noqa: SLF001 - nor for this
    )


def row_losses(
    student_logits: Float[Tensor, "row class"], terms: RowTerms, *, is_summed: bool
) -> Float[Tensor, " row"] | Float[Tensor, ""]:
    """Give the rows' losses or their sum, in blocks of rows unless every operation is followed."""
    if is_followed():
        return _summed_if(is_summed, terms.losses(student_logits))
    found: Tensor = _InRowBlocks.apply(  # type: ignore[no-untyped-call]
        student_logits, terms, is_summed, torch.is_grad_enabled()
    )
    return found


class _InRowBlocks(torch.autograd.Function):
    """Row losses whose gradient is computed beside them, so that the soft targets are decoded once.

    Their sum is taken here, and is no operation of its own that autograd would go through.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, terms: RowTerms, is_summed: bool, has_grad: bool) -> Tensor:  # noqa: FBT001
        ctx.save_for_backward(student_logits)
        ctx.terms, ctx.is_summed = terms, is_summed
        ctx.gradient = _room_for(student_logits, terms) if has_grad and ctx.needs_input_grad[0] else None
        return _summed_if(is_summed, terms.losses_in_row_blocks(student_logits, ctx.gradient))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        (student_logits,) = ctx.saved_tensors
        terms: RowTerms = ctx.terms
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            found = _summed_if(ctx.is_summed, terms.losses(student_logits))
            (gradient,) = torch.autograd.grad(found, student_logits, slopes, create_graph=True)
            return gradient, None, None, None
        gradient, ctx.gradient = ctx.gradient, None  # handed out and overwritten: a second pass computes its own
        if gradient is None:
            gradient = _room_for(student_logits, terms)
            terms.losses_in_row_blocks(student_logits, gradient)
        if not _are_ones(slopes[0]):
            gradient.mul_(slopes[0][..., None])
        return gradient.to(student_logits.dtype), None, None, None


def _summed_if(is_summed: bool, losses: Tensor) -> Tensor:  # noqa: FBT001 - the condition in the name
    return losses.sum() if is_summed else losses


def _room_for(student_logits: Tensor, terms: RowTerms) -> Tensor:
    """Make room for a gradient, 0 in rows that nothing will be written to.

    Of a float16 student it is float32: before a scaler's slope multiplies it, float16 would hold it as 0.
    """
    make = torch.empty if terms.alignment.selected is None else torch.zeros
    dtype = torch.float32 if student_logits.dtype == torch.float16 else student_logits.dtype
    return make(student_logits.shape, dtype=dtype, device=student_logits.device)


def _are_ones(slopes: Tensor) -> bool:
    """Tell whether all slopes are 1, as of a sum; looks where that is quick, and not at an accelerator's."""
    if slopes.device.type != "cpu" or slopes.numel() == 0 or any(slopes.stride()):
        return False
    return float(slopes if slopes.ndim == 0 else slopes[0]) == 1
