"""The topk codec: the largest logits, the mass of all others at every temperature, and the shape of that mass."""

from __future__ import annotations

__all__ = ["TopKCodec"]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Float64, Shaped
from torch import Tensor

from kdcache.codecs.base import (
    StorageDtype,
    check_codes,
    check_logits,
    check_num_classes,
    checked_temperature,
    row_blocks,
)
from kdcache.codecs.columns import LARGEST_CODE, Columns
from kdcache.codecs.levels import Levels
from kdcache.codecs.sampling import inclusion_probabilities, systematic_sample, thresholds, uniforms
from kdcache.codecs.tail import HIGHEST_BETA, LogPartition, separated, without
from kdcache.codecs.topk_pilot import PilotSums
from kdcache.documents.codec_specs import TopK
from kdcache.errors import CodecError, NonFiniteLogitsError

_EMPTY = LARGEST_CODE  # gap code of a place without a class
_NODE_STEP = 2.0**-9
_THRESHOLD_STEP = 2.0**-5
_THRESHOLD_SLACK = 2.0**-10  # of a step: more than sums in float32 are off, so that no row draws too many
_FAR_CODES = 256.0  # codes to a doubling of the far gap
_LARGEST_SIGNED = LARGEST_CODE // 2
_HASHED_GAPS = 32


@dataclass(frozen=True)
class _Kept:
    """The classes of rows that are kept one by one, [row, place], as decoded."""

    classes: Tensor  # an empty place repeats the first one's class
    gaps: Tensor  # to the row's maximum, float64; infinite in an empty place
    weakest_code: Tensor  # [row, 1], the largest gap code

    def values(self, shifts: Tensor) -> Tensor:
        """Give logits of the row's maximum less the gap, shifted; empty places repeat the first one's."""
        gaps = torch.where(self.gaps == torch.inf, self.gaps[:, :1], self.gaps)
        return (shifts[:, None] - gaps).to(torch.float32)


@dataclass(frozen=True)
class TopKCodec:
    spec: TopK
    num_classes: int

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)

    @property
    def num_columns(self) -> int:
        """Columns of a row of codes."""
        return self.columns.num_columns

    @property
    def storage_dtype(self) -> StorageDtype:
        """Type of the codes."""
        return "uint16"

    @property
    def fill(self) -> int:
        """Reserved code of a hole."""
        return LARGEST_CODE + 1

    @property
    def depends_on_temperature(self) -> bool:
        """True: the tail is kept as a function of temperature."""
        return True

    @property
    def is_normalised(self) -> bool:
        """Whether decoded logits over temperature are log-weights to be used as they are: with tail `samples`."""
        return self.spec.tail == "samples"

    @property
    def reach(self) -> float:
        """Logits below its row's maximum beyond which a class counts as masked: 8.4 million with the default step."""
        return self._levels.last

    @cached_property
    def columns(self) -> Columns:
        """Where each field stands in a row of codes."""
        widths = {"kept_class": self._num_kept, "kept_gap": self._num_kept, "node": self.spec.num_nodes}
        widths |= {"far_count": 1, "far_gap": 1}
        numbers: tuple[str, ...] = ("kept_class", "far_count")
        if self.is_normalised:
            num_drawn = min(self.spec.num_samples, self.num_classes - self._num_kept)
            widths |= {"masked_count": 1, "threshold": 1, "drawn_class": num_drawn, "drawn_gap": num_drawn}
            numbers = (*numbers, "masked_count", "drawn_class")
        return Columns(widths, high=numbers if self.num_classes > LARGEST_CODE + 1 else ())

    def fit(self, pilot: Float[Tensor, "row class"]) -> dict[str, npt.NDArray[Any]]:
        check_logits(pilot, self.num_classes)
        if pilot.shape[0] == 0:
            raise CodecError("The pilot has no rows: there is nothing to rank the classes by.")
        sums = PilotSums(self.num_classes, self.spec.num_nodes)
        for block in row_blocks(*pilot.shape):
            gaps = self._gaps(pilot[block].detach().cpu(), block.start)
            classes, closest = self._largest(gaps)
            tail = separated(gaps, classes, _last_finite(closest))
            sums.add(gaps, classes, tail, self._log_partition.fit(tail))
        parameters = sums.common_parameters()
        if not self.is_normalised:
            parameters["class_means"] = sums.class_means(num_kept=self._num_kept)
        return parameters

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        num_nodes = self.spec.num_nodes
        expected = {
            "class_of_rank": (torch.int64, (self.num_classes,)),
            "node_basis": (torch.float32, (num_nodes, num_nodes)),
            "node_mean": (torch.float32, (num_nodes,)),
        }
        if not self.is_normalised:
            expected["class_means"] = (torch.float32, (self.num_classes,))
        found = {name: (value.dtype, tuple(value.shape)) for name, value in parameters.items()}
        if found != expected:
            raise CodecError(f"This topk codec needs the parameters {expected}, got {found}.")
        on_cpu = {name: value.detach().cpu() for name, value in parameters.items()}
        if not torch.equal(on_cpu["class_of_rank"].sort().values, torch.arange(self.num_classes)):
            raise CodecError("class_of_rank does not hold every class once: it is altered.")
        basis = on_cpu["node_basis"].to(torch.float64)
        rotated = basis @ basis.T - torch.eye(num_nodes, dtype=torch.float64)
        if not (bool(rotated.abs().amax() < 1e-4) and bool(on_cpu["node_mean"].isfinite().all())):
            raise CodecError("node_basis is no rotation, or node_mean is not finite: one of them is altered.")
        means = on_cpu.get("class_means", torch.zeros(1))
        if not (bool((means < torch.inf).all()) and bool(means.isfinite().any())):
            raise CodecError("Class means must be finite, or -inf for masked classes, and not all of them -inf.")

    def encode(
        self, logits: Float[Tensor, "row class"], parameters: Mapping[str, Tensor]
    ) -> Shaped[Tensor, "row column"]:
        check_logits(logits, self.num_classes)
        codes = torch.empty(logits.shape[0], self.num_columns, dtype=torch.uint16, device=logits.device)
        class_of_rank = parameters["class_of_rank"]
        rank_of_class = torch.empty_like(class_of_rank)
        rank_of_class[class_of_rank] = torch.arange(self.num_classes, device=logits.device)
        masked = None if self.is_normalised else parameters["class_means"] == -torch.inf
        for block in row_blocks(*logits.shape):
            gaps = self._gaps(logits[block].detach(), block.start)
            if masked is not None:
                _check_masks(gaps, masked, first_row=block.start)
            codes[block] = self.columns.pack(self._fields(gaps, parameters, rank_of_class))
        return codes

    def decode(
        self, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor], *, temperature: float = 1.0
    ) -> Float32[Tensor, "row class"]:
        check_codes(codes, self)
        temperature = checked_temperature(temperature)
        fields = self.columns.unpack(codes)
        kept = self._kept(fields, parameters)
        log_tail = self._log_tail(fields, kept, parameters, 1 / temperature)
        log_partition = torch.logaddexp(torch.logsumexp(-kept.gaps / temperature, dim=1), log_tail)
        log_partition = torch.where(self.is_fill(codes), torch.nan, log_partition)
        if self.is_normalised:
            logits = self._drawn(fields, kept, parameters, log_partition, temperature)
        else:
            logits = _shaped(kept, parameters["class_means"], log_tail - log_partition, temperature)
        return logits.scatter_(1, kept.classes, kept.values(-temperature * log_partition))

    def is_fill(self, codes: Shaped[Tensor, "row column"]) -> Bool[Tensor, " row"]:
        """Tell for each row whether it holds the fill code in any column."""
        check_codes(codes, self)
        return (codes.view(torch.int16) == -1).any(dim=1)

    def log_partition_error(
        self,
        logits: Float[Tensor, "row class"],
        codes: Shaped[Tensor, "row column"],
        parameters: Mapping[str, Tensor],
        *,
        temperature: float = 1.0,
    ) -> Float64[Tensor, " row"]:
        check_logits(logits, self.num_classes)
        check_codes(codes, self)
        beta = 1 / checked_temperature(temperature)
        fields = self.columns.unpack(codes)
        kept = self._kept(fields, parameters)
        of_kept = torch.logsumexp(-beta * kept.gaps, dim=1)
        errors = torch.logaddexp(of_kept, self._log_tail(fields, kept, parameters, beta))
        for block in row_blocks(*logits.shape):
            tail = without(self._gaps(logits[block].detach(), block.start).to(torch.float64), kept.classes[block])
            errors[block] -= torch.logaddexp(of_kept[block], torch.logsumexp(-beta * tail, dim=1))
        return errors

    @property
    def _num_kept(self) -> int:
        return min(self.spec.k, self.num_classes)

    @property
    def _levels(self) -> Levels:
        return Levels(self.spec.step)

    @property
    def _log_partition(self) -> LogPartition:
        return LogPartition(self.spec.num_nodes)

    def _gaps(self, logits: Tensor, first_row: int) -> Tensor:
        """Give float32 gaps to the row's maximum, infinite for masked classes."""
        wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
        highest = wide.amax(dim=1, keepdim=True)
        if not bool(highest.isfinite().all()):
            row = first_row + int(highest.isfinite().logical_not().nonzero()[0, 0])
            raise NonFiniteLogitsError(
                f"Row {row} of the logits holds NaN or +inf, or nothing but -inf; a cache keeps finite logits, and -inf "
                "for masked classes beside at least one finite logit."
            )
        gaps = (highest - wide).to(torch.float32)
        return gaps.masked_fill_(gaps > self.reach, torch.inf) if bool(gaps.amax() > self.reach) else gaps

    def _largest(self, gaps: Tensor, *, num_closest: int = 0) -> tuple[Tensor, Tensor]:
        """Find the k classes with the smallest gaps, the lowest first among equals, and the smallest gaps in order.

        Gives classes [row, place], rising, with places that stay empty holding the number of classes; and at least
        k gaps, as many as `num_closest` where there are that many classes.
        """
        count = min(max(self._num_kept + 1, num_closest), self.num_classes)
        closest, classes = gaps.topk(count, dim=1, largest=False)
        classes = classes[:, : self._num_kept].sort(dim=1).values
        weakest = closest[:, self._num_kept - 1]
        tied = weakest == torch.inf
        if count > self._num_kept:
            tied |= closest[:, self._num_kept] == weakest
        rows = tied.nonzero()[:, 0]
        if len(rows):
            classes[rows] = _first_of_equals(gaps[rows], closest[rows, : self._num_kept])
        return classes, closest

    def _fields(
        self, gaps: Tensor, parameters: Mapping[str, Tensor], rank_of_class: Tensor
    ) -> dict[str, Shaped[Tensor, "row place"]]:
        classes, closest = self._largest(gaps, num_closest=_HASHED_GAPS)
        ranks, codes = self._listed(classes, gaps, rank_of_class)
        weakest_code = torch.where(codes == _EMPTY, 0, codes).amax(dim=1, keepdim=True)
        tail = separated(gaps, classes, self._levels.gaps(weakest_code)[:, 0])
        offsets = self._log_partition.fit(tail) - parameters["node_mean"]
        components = offsets @ parameters["node_basis"].to(torch.float64).T / _NODE_STEP
        fields = {
            "kept_class": _deltas(ranks),
            "kept_gap": torch.where(codes == _EMPTY, _EMPTY, weakest_code - codes),
            "node": _zigzag(components.round()),
            "far_count": tail.num_far[:, None],
            "far_gap": (tail.far_gap.clamp(min=1).log2() * _FAR_CODES).round().to(torch.int64)[:, None],
        }
        if self.is_normalised:
            num_unmasked = (codes != _EMPTY).sum(dim=1) + tail.num_near + tail.num_far
            content = torch.cat([classes, closest.view(torch.int32)], dim=1)
            drawn = self._drawn_fields(gaps, classes, weakest_code, rank_of_class, uniforms(content, self.spec.seed))
            fields |= {"masked_count": (self.num_classes - num_unmasked)[:, None], **drawn}
        return fields

    def _drawn_fields(
        self, gaps: Tensor, classes: Tensor, weakest_code: Tensor, rank_of_class: Tensor, uniform: Tensor
    ) -> dict[str, Tensor]:
        num_drawn = self.columns.widths["drawn_class"]
        weakest = self._levels.gaps(weakest_code).to(torch.float32)
        coded = without(self._levels.rounded(gaps).sub_(weakest), classes)
        threshold = thresholds(coded, num_drawn, self.spec.sample_temperature) / _THRESHOLD_STEP
        threshold = (threshold - _THRESHOLD_SLACK).clamp_(-_LARGEST_SIGNED, _LARGEST_SIGNED).floor_()
        probabilities = inclusion_probabilities(coded, threshold * _THRESHOLD_STEP, self.spec.sample_temperature)
        ranks, codes = self._listed(systematic_sample(probabilities, uniform, num_drawn), gaps, rank_of_class)
        return {
            "threshold": _zigzag(threshold)[:, None],
            "drawn_class": _deltas(ranks),
            "drawn_gap": torch.where(codes == _EMPTY, _EMPTY, codes - weakest_code),
        }

    def _listed(self, classes: Tensor, gaps: Tensor, rank_of_class: Tensor) -> tuple[Tensor, Tensor]:
        """List the ranks and gap codes of classes by rank, [row, place]; empty places last."""
        empty = classes == self.num_classes
        inside = classes.clamp(max=self.num_classes - 1)
        ranks, order = rank_of_class[inside].masked_fill_(empty, self.num_classes).sort(dim=1)
        codes = self._levels.nearest(gaps.gather(1, inside)).to(torch.int64)
        return ranks, codes.masked_fill_(empty, _EMPTY).gather(1, order)

    def _kept(self, fields: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> _Kept:
        codes = fields["kept_gap"]
        empty = codes == _EMPTY
        weakest_code = torch.where(empty, 0, codes).amax(dim=1, keepdim=True)
        gaps = self._levels.gaps((weakest_code - codes).clamp(min=0)).masked_fill_(empty, torch.inf)
        classes = self._classes(fields["kept_class"], parameters)
        return _Kept(torch.where(empty, classes[:, :1], classes), gaps, weakest_code)

    def _classes(self, deltas: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        ranks = (deltas + 1).cumsum(dim=1) - 1
        return parameters["class_of_rank"][ranks.clamp(max=self.num_classes - 1)]

    def _log_tail(
        self, fields: Mapping[str, Tensor], kept: _Kept, parameters: Mapping[str, Tensor], beta: float
    ) -> Float64[Tensor, " row"]:
        """Give the log-partition of the tail, of logits whose row's maximum is 0."""
        offsets = _signed(fields["node"]).to(torch.float64) @ parameters["node_basis"].to(torch.float64)
        log_mean = self._log_partition.evaluate(offsets * _NODE_STEP + parameters["node_mean"], beta)
        if self.is_normalised:
            num_masked = fields["masked_count"][:, 0]
        else:
            num_masked = (parameters["class_means"] == -torch.inf).sum()
        num_far = fields["far_count"][:, 0]
        num_near = self.num_classes - num_masked - (kept.gaps < torch.inf).sum(dim=1) - num_far
        near = num_near.clamp(min=0).to(torch.float64).log() + log_mean
        far = num_far.to(torch.float64).log() - beta * torch.exp2(fields["far_gap"][:, 0] / _FAR_CODES)
        return torch.logaddexp(near, far) - beta * self._levels.gaps(kept.weakest_code)[:, 0]

    def _drawn(
        self,
        fields: Mapping[str, Tensor],
        kept: _Kept,
        parameters: Mapping[str, Tensor],
        log_partition: Tensor,
        temperature: float,
    ) -> Tensor:
        """Give temperature * log(p / inclusion probability) of the drawn classes, and -inf for all others."""
        codes = fields["drawn_gap"]
        empty = codes == _EMPTY
        weakest = self._levels.gaps(kept.weakest_code)
        gaps = self._levels.gaps(torch.where(empty, 0, codes) + kept.weakest_code) - weakest
        threshold = _signed(fields["threshold"][:, 0]) * _THRESHOLD_STEP
        probabilities = inclusion_probabilities(gaps, threshold, self.spec.sample_temperature)
        values = -gaps - weakest - temperature * (log_partition[:, None] + probabilities.log())
        classes = torch.where(empty, kept.classes[:, :1], self._classes(fields["drawn_class"], parameters))
        nothing = torch.where(log_partition.isnan(), torch.nan, -torch.inf).to(torch.float32)
        return nothing[:, None].repeat(1, self.num_classes).scatter_(1, classes, values.to(torch.float32))


def _shaped(kept: _Kept, means: Tensor, log_mass: Tensor, temperature: float) -> Tensor:
    """Give temperature * log p with the tail's mass laid out like the class means, wrong as yet for the kept classes."""
    beta = min(1 / temperature, HIGHEST_BETA)  # beyond it, the difference of sums would lose its digits
    rises = means - means.amax()
    weights = (rises.to(torch.float64) * beta).exp_()
    of_kept = torch.where(kept.gaps == torch.inf, 0.0, weights[kept.classes]).sum(dim=1)
    log_scale = log_mass - (weights.sum() - of_kept).clamp(min=0).log()
    shifts = torch.where(log_mass == -torch.inf, -torch.inf, temperature * log_scale).to(torch.float32)
    return (rises * (temperature * beta)).add(shifts[:, None])


def _check_masks(gaps: Tensor, masked: Tensor, *, first_row: int) -> None:
    """Refuse rows that mask other classes than the pilot did."""
    if bool((gaps.amax() < torch.inf) & ~masked.any()):
        return
    differ = (gaps == torch.inf) != masked
    if bool(differ.any()):
        row, index = differ.nonzero()[0].tolist()
        now, before = ("not ", "every") if bool(masked[index]) else ("", "not every")
        raise CodecError(
            f"Row {first_row + row}: class {index} is {now}masked, and is masked in {before} row of the pilot. Class "
            'means hold masks that are the same in every row. Use TopK(tail="samples") or Lossless(), which keep masks '
            "that change from row to row. Nothing was encoded."
        )


def _first_of_equals(gaps: Tensor, closest: Tensor) -> Tensor:
    """Find the classes of the smallest finite gaps, the lowest first among equals; [row, place], rising."""
    num_rows, num_kept = closest.shape
    weakest = _last_finite(closest)
    rows, classes = (gaps <= weakest[:, None]).nonzero().unbind(dim=1)
    equal = gaps[rows, classes] == weakest[rows]
    num_equal = _counts(rows[equal], num_rows)
    order = equal.cumsum(0) - (num_equal.cumsum(0) - num_equal)[rows]  # 1 for the row's first equal class, 2, ...
    room = num_kept - _counts(rows[~equal], num_rows)
    chosen = ~equal | (order <= room[rows])
    rows, classes = rows[chosen], classes[chosen]
    counts = _counts(rows, num_rows)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    listed = torch.full((num_rows, num_kept), gaps.shape[1], device=rows.device)
    listed[rows, places] = classes
    return listed


def _counts(rows: Tensor, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.int64, device=rows.device).index_add_(0, rows, torch.ones_like(rows))


def _last_finite(rising: Tensor) -> Tensor:
    """Give the largest finite number of each row."""
    return torch.where(rising == torch.inf, -torch.inf, rising).amax(dim=1)


def _deltas(ranks: Tensor) -> Tensor:
    """Give rising ranks as their distances less 1, and 0 or more in the empty places at the end."""
    return ranks.diff(dim=1, prepend=torch.full_like(ranks[:, :1], -1)).sub_(1).clamp_(min=0)


def _zigzag(numbers: Tensor) -> Tensor:
    """Give whole numbers of float type, clamped, as 0, 1, 2, 3, ... for 0, -1, 1, -2, ...: int64."""
    clamped = numbers.clamp(-_LARGEST_SIGNED, _LARGEST_SIGNED).to(torch.int64)
    return torch.where(clamped < 0, -2 * clamped - 1, 2 * clamped)


def _signed(zigzag: Tensor) -> Tensor:
    return torch.where(zigzag % 2 == 1, -(zigzag // 2) - 1, zigzag // 2)
