"""Encoding rows with the topk codec, a block at a time."""

from __future__ import annotations

__all__ = ["Encoder"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from kdcache.codecs.topk.format import (
    EMPTY,
    FAR_NODE_STEP,
    LARGEST_SIGNED,
    NODE_STEP,
    THRESHOLD_STEP,
    columns_of,
    deltas,
    zigzag,
)
from kdcache.codecs.topk.levels import Levels
from kdcache.codecs.topk.sampling import inclusion_probabilities, systematic_sample, thresholds, uniforms
from kdcache.codecs.topk.selection import largest
from kdcache.codecs.topk.tail import separated, without
from kdcache.documents.codec_specs import TopK

_THRESHOLD_SLACK = 2.0**-10  # of a step: more than sums in float32 are off, so that no row draws too many
_HASHED_GAPS = 32


@dataclass(frozen=True)
class Encoder:
    """Turns gaps into the fields of a row of codes.

    Parameters
    ----------
    spec : TopK
        Options of the codec.
    parameters : Mapping[str, Tensor]
        Its parameters, on the device of the rows.
    rank_of_class : Tensor [class]
        int64, the inverse of the parameter `class_of_rank`.
    """

    spec: TopK
    parameters: Mapping[str, Tensor]
    rank_of_class: Int64[Tensor, " class"]

    def fields(self, gaps: Float32[Tensor, "row class"]) -> dict[str, Shaped[Tensor, "row place"]]:
        """Give the fields of some rows, int64 [row, place] each.

        Parameters
        ----------
        gaps : Tensor [row, class]
            Gaps to the row's maximum, infinite for masked classes.
        """
        classes, closest = largest(gaps, min(self.spec.k, self._num_classes), num_gaps=_HASHED_GAPS)
        ranks, codes = self._listed(classes, gaps)
        weakest_code = torch.where(codes == EMPTY, 0, codes).amax(dim=1, keepdim=True)
        tail = separated(gaps, classes, self._levels.gaps(weakest_code)[:, 0], num_nodes=self.spec.num_nodes)
        offsets = tail.coefficients - self.parameters["node_mean"]
        components = offsets @ self.parameters["node_basis"].to(torch.float64).T / NODE_STEP
        fields = {
            "kept_class": deltas(ranks),
            "kept_gap": torch.where(codes == EMPTY, EMPTY, weakest_code - codes),
            "node": zigzag(components.round()),
            "far_count": tail.far_count,
            "far_gap": tail.far_gap,
            "far_node": zigzag((tail.far_coefficients / FAR_NODE_STEP).round()).flatten(1),
        }
        if self.spec.tail == "samples":
            num_unmasked = (codes != EMPTY).sum(dim=1) + tail.num_classes
            content = torch.cat([classes, closest.view(torch.int32)], dim=1)
            drawn = self._drawn_fields(gaps, classes, weakest_code, uniforms(content, self.spec.seed))
            fields |= {"masked_count": (self._num_classes - num_unmasked)[:, None], **drawn}
        return fields

    def _drawn_fields(self, gaps: Tensor, classes: Tensor, weakest_code: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        num_drawn = columns_of(self.spec, self._num_classes).widths["drawn_class"]
        weakest = self._levels.gaps(weakest_code).to(torch.float32)
        coded = without(self._levels.rounded(gaps).sub_(weakest), classes)
        threshold = thresholds(coded, num_drawn, self.spec.sample_temperature) / THRESHOLD_STEP
        threshold = (threshold - _THRESHOLD_SLACK).clamp_(-LARGEST_SIGNED, LARGEST_SIGNED).floor_()
        probabilities = inclusion_probabilities(coded, threshold * THRESHOLD_STEP, self.spec.sample_temperature)
        ranks, codes = self._listed(systematic_sample(probabilities, uniform, num_drawn), gaps)
        return {
            "threshold": zigzag(threshold)[:, None],
            "drawn_class": deltas(ranks),
            "drawn_gap": torch.where(codes == EMPTY, EMPTY, codes - weakest_code),
        }

    def _listed(self, classes: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """List the ranks and gap codes of classes by rank, [row, place]; empty places last."""
        empty = classes == self._num_classes
        inside = classes.clamp(max=self._num_classes - 1)
        ranks, order = self.rank_of_class[inside].masked_fill_(empty, self._num_classes).sort(dim=1)
        codes = self._levels.nearest(gaps.gather(1, inside)).to(torch.int64)
        return ranks, codes.masked_fill_(empty, EMPTY).gather(1, order)

    @property
    def _num_classes(self) -> int:
        return len(self.rank_of_class)

    @property
    def _levels(self) -> Levels:
        return Levels(self.spec.step)
