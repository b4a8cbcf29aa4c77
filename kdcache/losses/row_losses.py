"""The loss of every row and its gradient, in blocks of rows where a batch is large.

A batch whose logits are no more than `softened_elements` is taken whole, with plain autograd. For a larger one the
soft targets are decoded block by block, and each row's loss and gradient are computed together, a few rows at a time:
no array as large as the student's logits is made but their gradient, which a backward pass would make anyway.
"""

from __future__ import annotations

__all__ = ["RowTerms", "row_losses"]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from kdcache.losses.divergences import Divergence, forward_kl, logit_matching_loss, soft_cross_entropy
from kdcache.losses.ensemble import Ensemble
from kdcache.soft_targets import at_least_float32, softened_blocks, softened_elements


@dataclass(frozen=True)
class RowTerms:
    """What a row's loss is made of: soft_weight * soft term + (1 - soft_weight) * hard term.

    Parameters
    ----------
    ensemble : Ensemble, optional
        The teachers, on the student's device. Needed where `soft_weight` is above 0.
    classes : Tensor [row], optional
        int64 labels, on the student's device. Needed where `soft_weight` is below 1.
    temperature : float
        Of the soft term.
    soft_weight : float
        From 0 to 1.
    divergence : Divergence
        The soft term.
    """

    ensemble: Ensemble | None
    classes: Int64[Tensor, " row"] | None
    temperature: float
    soft_weight: float
    divergence: Divergence

    def losses(self, student_logits: Float[Tensor, "row class"]) -> Float[Tensor, " row"]:
        """Give the rows' losses, all at once, in operations that autograd and compilers follow."""
        compared = None if self.ensemble is None else self.ensemble.compared(self.divergence, self.temperature)
        return self._of(student_logits, compared, self.classes)

    def losses_in_row_blocks(
        self, student_logits: Float[Tensor, "row class"], gradient: Float[Tensor, "row class"] | None = None
    ) -> Float[Tensor, " row"]:
        """Give the rows' losses block by block; each row's gradient is written into `gradient` where there is one."""
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        losses = student_logits.new_empty(len(student_logits), dtype=dtype)
        for block, compared in self._blocks(student_logits):
            for part in softened_blocks(block.stop - block.start, student_logits.shape[1], student_logits.device):
                rows = slice(block.start + part.start, block.start + part.stop)
                beside = None if compared is None else compared[part]
                classes = None if self.classes is None else self.classes[rows]
                if gradient is None:
                    losses[rows] = self._of(student_logits[rows].detach(), beside, classes)
                else:
                    losses[rows], gradient[rows] = self._with_gradient(student_logits[rows], beside, classes)
        return losses

    def _blocks(self, student_logits: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
        if self.ensemble is None:
            yield slice(0, len(student_logits)), None
            return
        for rows, block in self.ensemble.row_blocks():
            yield rows, block.compared(self.divergence, self.temperature)

    def _with_gradient(
        self, student_logits: Tensor, compared: Tensor | None, classes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            student = student_logits.detach().requires_grad_()
            losses = self._of(student, compared, classes)
            (gradient,) = torch.autograd.grad(losses.sum(), student)
        return losses.detach(), gradient

    def _of(self, student_logits: Tensor, compared: Tensor | None, classes: Tensor | None) -> Tensor:
        student = at_least_float32(student_logits)
        losses = student.new_zeros(student.shape[0])
        if compared is not None:
            losses = losses + self.soft_weight * self._soft_term(student, compared)
        if classes is not None:
            losses = losses + (1 - self.soft_weight) * functional.cross_entropy(student, classes, reduction="none")
        return losses

    def _soft_term(self, student: Tensor, compared: Tensor) -> Tensor:
        if self.divergence == "logit-matching":
            return logit_matching_loss(student, compared, reduction="none")
        divergence = forward_kl if self.divergence == "forward-kl" else soft_cross_entropy
        log_student = torch.log_softmax(student / self.temperature, dim=-1)
        return self.temperature**2 * divergence(log_student, compared.to(student.dtype))


def row_losses(student_logits: Float[Tensor, "row class"], terms: RowTerms) -> Float[Tensor, " row"]:
    """Give the rows' losses: in blocks of rows where the batch is large, unless a compiler or `torch.func` follows."""
    is_followed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # noqa: SLF001
    if is_followed or student_logits.numel() <= softened_elements(student_logits.device):
        return terms.losses(student_logits)
    losses: Tensor = _InRowBlocks.apply(student_logits, terms, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return losses


class _InRowBlocks(torch.autograd.Function):
    """Row losses whose gradient is computed beside them, so that the soft targets are decoded once."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, terms: RowTerms, is_grad_enabled: bool) -> Tensor:  # noqa: FBT001
        ctx.save_for_backward(student_logits)
        ctx.terms = terms
        ctx.gradient = torch.empty_like(student_logits) if is_grad_enabled and ctx.needs_input_grad[0] else None
        return terms.losses_in_row_blocks(student_logits, ctx.gradient)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (student_logits,) = ctx.saved_tensors
        terms: RowTerms = ctx.terms
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            (gradient,) = torch.autograd.grad(terms.losses(student_logits), student_logits, slopes, create_graph=True)
            return gradient, None, None
        gradient, ctx.gradient = ctx.gradient, None  # handed out and overwritten: a second pass computes its own
        if gradient is None:
            gradient = torch.empty_like(student_logits)
            terms.losses_in_row_blocks(student_logits, gradient)
        return gradient.mul_(slopes[0][:, None]), None, None
