"""Rows of hidden states of a teacher whose head is known, on their way into the spectral codec.

Their coordinates are a small linear map of the hidden states, and the logits that are needed to measure what coding
changed are made tile by tile, in the head's own precision.
"""

from __future__ import annotations

__all__ = ["HeadRows", "PreparedHead"]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.head_logits import Head, HeadLogits
from kdcache.codecs.precision import factor_rounding, keeps_float32, quick_dtype, sum_rounding
from kdcache.codecs.row_errors import ErrorSums, RowErrors
from kdcache.codecs.spectral.rows import PRECISE_CLASSES, SMALLEST_QUICK_KL, MadeRows, class_blocks, felt, in_blocks

_MOST_OUTSIDE = 1 / 8
"""Share of the root of the smallest target that the root of KL may be uncertain by, for what the basis leaves out."""


class Outside(NamedTuple):
    """What a basis leaves out of each row's logits, float64 [row].

    Attributes
    ----------
    most : Tensor [row]
        Of any logit at most: the Cauchy-Schwarz bound |x| max |r_c|.
    likely : Tensor [row]
        Of likely ones: four times `typical`, as if they were spread like noise, and as often more as the most affected
        class stands out; never above `most`.
    typical : Tensor [row]
        Root of the mean over classes, weighted, of (x r_c)^2.
    """

    most: Float64[Tensor, " row"]
    likely: Float64[Tensor, " row"]
    typical: Float64[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class PreparedHead:
    """What coding needs of a head, derived once for a basis.

    What a basis does not hold of a head, its residual, is the rounding of a float16 basis, unless the rank was cut or
    the head is not the one that the basis was fitted to. Hidden units are scaled so that each contributes alike to the
    logits; with x a scaled row of hidden states and r_c the scaled residual of a class, the class's logit is off by
    x r_c.

    Attributes
    ----------
    head, likely : Head
        Without masked classes; and of the likely classes alone.
    turn : Tensor [component of the head, component]
        float64: coordinates = hidden @ turn + origin.
    origin : Tensor [component]
        float64.
    noise_basis : Tensor [component, class]
        The basis in the precision of the products that measure.
    longest : float
        Largest length of a class's column of the basis.
    largest_weights : Tensor [component of the head]
        float64, largest magnitude over classes of each hidden unit's weight.
    largest_bias : float
        Largest magnitude of the head's bias.
    projection : Tensor [component, component]
        Of the parameters that all this was derived from.
    scales : Tensor [component of the head]
        float64, lengths of the hidden units' columns over classes, weighted.
    residual : Tensor [component of the head, component of the head]
        float64, mean over classes, weighted, of r_c r_c^T.
    longest_residual : float
        Largest |r_c|.
    peak_residual : float
        The same over the root of the mean of |r_c|^2: how unevenly classes are off.
    constant_residual : float
        Largest error that does not depend on the hidden states, of the bias.
    """

    head: Head
    likely: Head
    turn: Float64[Tensor, "hidden component"]
    origin: Float64[Tensor, " component"]
    noise_basis: Float[Tensor, "component class"]
    longest: float
    largest_weights: Float64[Tensor, " hidden"]
    largest_bias: float
    projection: Float64[Tensor, "component component"]
    scales: Float64[Tensor, " hidden"]
    residual: Float64[Tensor, "hidden hidden"]
    longest_residual: float
    peak_residual: float
    constant_residual: float

    @classmethod
    def kept(cls, head: Head, parameters: Mapping[str, Tensor]) -> PreparedHead:
        """Give what was derived last, if it was from these parameters, or derive it and keep it with the head."""
        last = head.prepared.get(cls)
        if isinstance(last, cls) and last.projection is parameters["projection"]:
            return last
        prepared = head.prepared[cls] = cls.of(head, parameters)
        return prepared

    @classmethod
    def of(cls, head: Head, parameters: Mapping[str, Tensor]) -> PreparedHead:
        """Project the head's columns onto the basis, and find what it leaves, in blocks of classes."""
        basis, mean, weights = (parameters[name] for name in ("basis", "mean", "weights"))
        num_classes, num_hidden = head.weight.shape
        turn = torch.zeros(num_hidden, len(basis), dtype=torch.float64, device=basis.device)
        origin, scales = turn.new_zeros(len(basis)), turn.new_zeros(num_hidden)
        largest_weights, longest = torch.zeros_like(scales), 0.0
        for block in class_blocks(num_classes):
            weighted = basis[:, block].float() * weights[block]
            columns = _columns_of(head, block)
            turn += (columns.float() @ weighted.T).double()
            scales += columns.square() @ weights[block].double()
            origin += weighted.double() @ (_bias_of(head, block) - mean[block].double())
            longest = max(longest, float(basis[:, block].float().norm(dim=0).amax()))
            largest_weights = torch.maximum(largest_weights, head.weight[block].double().abs().amax(dim=0))
        turn, origin = turn @ parameters["projection"], origin @ parameters["projection"]
        scales = torch.where(scales > 0, scales.sqrt(), 1.0)
        residual = _Residual.of(head, parameters, turn, origin, scales)
        return cls(
            head=head,
            likely=head.classes(parameters["likely"]),
            turn=turn,
            origin=origin,
            noise_basis=basis.to(_noise_dtype(head.weight)),
            longest=longest,
            largest_weights=largest_weights,
            largest_bias=0.0 if head.bias is None else float(head.bias.abs().amax()),
            projection=parameters["projection"],
            scales=scales,
            residual=residual.second_moment,
            longest_residual=residual.longest,
            peak_residual=residual.longest / max(float(residual.second_moment.trace()) ** 0.5, 1e-300),
            constant_residual=residual.constant,
        )

    def coordinates(self, hidden: Float[Tensor, "row hidden"]) -> Float64[Tensor, "row component"]:
        """Turn hidden states."""
        return hidden.double() @ self.turn + self.origin

    def outside(self, hidden: Float[Tensor, "row hidden"]) -> Outside:
        """Say what the basis leaves out of each row."""
        scaled = hidden.double() * self.scales
        most = scaled.norm(dim=1) * self.longest_residual
        typical = ((scaled @ self.residual) * scaled).sum(dim=1).clamp(min=0).sqrt()
        likely = torch.minimum(most, 4 * max(1.0, self.peak_residual) * typical)
        constant = self.constant_residual
        return Outside(most=most + constant, likely=likely + constant, typical=typical + constant)


@dataclass(frozen=True)
class _Residual:
    second_moment: Float64[Tensor, "hidden hidden"]
    longest: float
    constant: float

    @classmethod
    def of(
        cls, head: Head, parameters: Mapping[str, Tensor], turn: Tensor, origin: Tensor, scales: Tensor
    ) -> _Residual:
        basis, mean, weights = (parameters[name] for name in ("basis", "mean", "weights"))
        moment = torch.zeros(len(turn), len(turn), dtype=torch.float64, device=basis.device)
        scaled_turn = (turn / scales[:, None]).float()
        longest, constant = 0.0, 0.0
        for block in class_blocks(len(head.weight)):
            columns = basis[:, block].float()
            rest = (_columns_of(head, block) / scales[:, None]).float() - scaled_turn @ columns
            moment += (rest * weights[block] @ rest.T).double()
            longest = max(longest, float(rest.norm(dim=0).amax()))
            off = origin @ columns.double() + mean[block].double() - _bias_of(head, block)
            constant = max(constant, float(off.abs().amax()))
        return cls(moment / weights.sum(dtype=torch.float64), longest, constant)


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Rows of hidden states, whose logits are linear in them and lie in the span of the basis.

    What coding changes is (quantised * step - coordinates) @ basis: a product of small numbers, for which bfloat16 will
    do. Its rounding is a sum of as many independent roundings as there are components, of which six standard deviations
    of the worst class are allowed for, and four of a mean over classes; the rounding of logits, of which weights are
    made, is allowed for as far as it can go, and so is what lies outside the basis. All go into bounds, ranges and the
    ceiling of KL. Rows of which much lies outside, and those whose measurement leaves a doubt, are compared in float32.

    Parameters
    ----------
    made : HeadLogits
    prepared : PreparedHead
    parameters : Mapping[str, Tensor]
        Prepared to encode, without masked classes.
    smallest : float
        The smallest KL that must be told apart, in nats.
    """

    made: HeadLogits
    prepared: PreparedHead
    parameters: Mapping[str, Tensor]
    smallest: float

    @staticmethod
    def can_measure(num_classes: int, *, smallest: float) -> bool:
        """Tell whether rows can be measured so: many classes, and no tiny target."""
        return num_classes > PRECISE_CLASSES and smallest >= SMALLEST_QUICK_KL

    def __len__(self) -> int:
        return len(self.made)

    @property
    def device(self) -> torch.device:
        """Where the hidden states lie."""
        return self.made.device

    def coordinates(self) -> Float64[Tensor, "row component"]:
        """Turn the hidden states."""
        return self.prepared.coordinates(self.made.hidden)

    def felt(self) -> Float32[Tensor, " row"]:
        """Compare rows over the likely classes."""
        return felt(self.prepared.likely.logits(self.made.hidden, self._dtype), self.parameters["norms"])

    def errors(self, rows: Tensor, quantised: Tensor, steps: Tensor) -> RowErrors:
        """Multiply the quantisation noise with the basis, and the hidden states with the head, tile by tile."""
        hidden = self.made.hidden[rows]
        much_outside = self.prepared.outside(hidden).likely > _MOST_OUTSIDE * (2 * self.smallest) ** 0.5
        if bool(much_outside.all()):
            return self.exact_errors(rows, quantised, steps)
        found = in_blocks(
            lambda block: self._errors(hidden[block], quantised[block], steps[block]), len(rows), self.device
        )
        # lost are rows whose largest logit is far above that of the likely classes
        lost = found.kl_ceiling.isfinite().all(dim=1).logical_not()
        again = (lost | much_outside).nonzero()[:, 0]
        if len(again):
            found.put(again, self.exact_errors(rows[again], quantised[again], steps[again]))
        return found

    def exact_errors(self, rows: Tensor, quantised: Tensor, steps: Tensor) -> RowErrors:
        """Make the rows' logits, a block of classes at a time, and compare as `MadeRows` does."""
        made = MadeRows(self.made.rows(rows), self.parameters, self.smallest)
        return made.errors(torch.arange(len(rows), device=self.device), quantised, steps)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the product with the head: the head's own, unless the hidden states are finer or float32 is quicker."""
        finer = torch.promote_types(self.made.hidden.dtype, self.prepared.head.weight.dtype)
        return quick_dtype(finer, self.device)

    def _errors(self, hidden: Tensor, quantised: Tensor, steps: Tensor) -> RowErrors:
        prepared, dtype, basis = self.prepared, self._dtype, self.prepared.noise_basis
        noise = quantised * steps.double() - prepared.coordinates(hidden)
        quarter_noise = (noise / 4).to(basis.dtype)
        quarter_hidden = hidden.to(dtype) / 4
        top = prepared.likely.logits(hidden, dtype).amax(dim=1).float()
        sums = ErrorSums(top, torch.zeros_like(top), self.made.shape[1])
        for block in class_blocks(self.made.shape[1]):
            errors = quarter_noise @ basis[:, block]
            logits = _quarter_logits(quarter_hidden, prepared.head.classes(block))
            for columns, quarter, offsets in sums.tiles(block):
                quarter.copy_(logits[:, columns])
                offsets.copy_(errors[:, columns])
        deviation = (2 / 3) ** 0.5 * factor_rounding(basis.dtype, self.device) * prepared.longest
        outside = prepared.outside(hidden)
        found = sums.row_errors(
            error_margin=6 * deviation * noise.abs().amax(dim=1) + outside.most,
            kl_margin=4 * deviation * noise.square().mean(dim=1).sqrt() + outside.likely,
            error_rounding=sum_rounding(basis.dtype, self.device),
            logit_rounding=sum_rounding(dtype, self.device),
            logit_margin=self._logit_margin(hidden, dtype),
        )
        return _with_outside(found, outside)

    def _logit_margin(self, hidden: Tensor, dtype: torch.dtype) -> Float64[Tensor, " row"]:
        """Say what logits may be off by, beside the rounding of their sums: of the bias, and six deviations of factors.

        Factors of 16 bits are exact; those of float32 are rounded where torch may take TF32 or bfloat16 for them.
        """
        is_exact = dtype != torch.float32 or keeps_float32(self.device)
        unit = 0.0 if is_exact else factor_rounding(dtype, self.device)
        deviation = (2 / 3) ** 0.5 * unit * (hidden.double() * self.prepared.largest_weights).norm(dim=1)
        margin: Tensor = 6 * deviation + sum_rounding(dtype, self.device) * self.prepared.largest_bias
        return margin


def _with_outside(errors: RowErrors, outside: Outside) -> RowErrors:
    """Add to KL what lies outside of the basis, of which no code tells: half its second moment."""
    temperatures = errors.kl.new_tensor(TEMPERATURES)
    kl = errors.kl + (outside.typical[:, None] / temperatures) ** 2 / 2
    return replace(errors, kl=kl, kl_ceiling=torch.maximum(kl, errors.kl_ceiling))


def _quarter_logits(quarter_hidden: Tensor, head: Head) -> Tensor:
    product = quarter_hidden @ head.weight.to(quarter_hidden.dtype).T
    return product if head.bias is None else product.to(torch.float32).add_(head.bias.to(torch.float32) / 4)


def _columns_of(head: Head, block: slice) -> Float64[Tensor, "hidden class"]:
    """Give the head's weight of some classes, less its mean over all classes."""
    return (head.weight[block].double() - head.means[0]).T


def _bias_of(head: Head, block: slice) -> Float64[Tensor, " class"]:
    """Give the head's bias of some classes, less its mean over all classes."""
    zeros = torch.zeros(block.stop - block.start, dtype=torch.float64, device=head.weight.device)
    return zeros if head.bias is None else head.bias[block].double() - head.means[1]


def _noise_dtype(weight: Tensor) -> torch.dtype:
    """Choose 16 bits where they are quicker than float32: by what the processor has, not by timing."""
    return quick_dtype(torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype, weight.device)
