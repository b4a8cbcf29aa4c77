"""The topk codec: the largest logits, the mass of all others at every temperature, and the shape of that mass."""

from __future__ import annotations

__all__ = ["TopKCodec"]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from kdcache.codecs.base import (
    StorageDtype,
    block_elements,
    check_codes,
    check_logits,
    check_num_classes,
    checked_temperature,
    row_blocks,
)
from kdcache.codecs.certificate import measure
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.guard import refuse_beyond_target
from kdcache.codecs.topk.columns import LARGEST_CODE, Columns
from kdcache.codecs.topk.encoder import Encoder
from kdcache.codecs.topk.format import (
    EMPTY,
    FAR_NODE_STEP,
    NODE_STEP,
    THRESHOLD_STEP,
    columns_of,
    ranks,
    signed,
)
from kdcache.codecs.topk.levels import Levels
from kdcache.codecs.topk.pilot import PilotSums
from kdcache.codecs.topk.sampling import inclusion_probabilities
from kdcache.codecs.topk.selection import gaps_to_maximum, largest, last_finite, refuse_other_masks
from kdcache.codecs.topk.tail import (
    HIGHEST_BETA,
    NUM_FAR_GROUPS,
    LogPartition,
    far_log_partition,
    separated,
    without,
)
from kdcache.documents.codec_specs import TopK
from kdcache.errors import CodecError

_GUARD_ELEMENTS = 2**22


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
    r"""Keeps the k largest logits, and of all other classes, the *tail*, their mass at every temperature and its shape.

    The columns of a row, uint16, in order; 65,535 is never written. Signed numbers are zigzag: 0, -1, 1 as 0, 1, 2.

    ==============  =======  ==========================================================================================
    field           columns  meaning
    ==============  =======  ==========================================================================================
    `kept_class`    k        kept classes, as rising ranks: the first rank, then the distances of neighbours, less 1.
                             `class_of_rank` gives the classes
    `kept_gap`      k        largest code of the row - code of the class, whose gap to the row's maximum is the level
                             x (1 + x / 8) of x = step code. So the weakest kept class has 0 and the row's maximum the
                             largest number. 65,534: no class here, as the row has fewer than k that are not masked
    `node`          n        log-partition of the near tail: signed / 512 times `node_basis` plus `node_mean` are the
                             Chebyshev coefficients c of F(beta) = beta sum of c_i T_i(1.4 beta - 1)
    `far_count`     4        tail classes of each of four far groups, left out of F; 0: there is no such group
    `far_gap`       4        2^(code / 256) = d: how far below the weakest kept class the group begins
    `far_node`      4 n      each group's signed / 1024, the Chebyshev coefficients c of
                             G(beta) = b sum of c_i T_i(b - 1), with b = beta d / 8, below 0
    `masked_count`  1        samples only: classes that are masked
    `threshold`     1        samples only: signed / 32, the threshold h of the inclusion probabilities
    `drawn_class`   m        samples only: drawn classes, as `kept_class`
    `drawn_gap`     m        samples only: code of the class - the row's largest kept code; 65,534: no class here
    high parts      ...      with over 65,535 classes only: n // 65,535 for the numbers n of `kept_class`, `far_count`,
                             `masked_count` and `drawn_class`, in this order, whose own columns then hold n % 65,535
    ==============  =======  ==========================================================================================

    With g the gap of the weakest kept class, N the number of near tail classes (all that are neither kept, masked nor
    far) and beta = 1 / temperature, the mass of the tail relative to the row's maximum is
    exp(-beta g) (N exp(F(beta)) + sum of far_count exp(G(beta) - beta d)): the kept classes' probabilities follow.
    Above beta = 10/7 and b = 2, F and G go on along their tangents. Near are the classes at most 64 logits below the
    weakest kept class; where F cannot follow them, at most 16 or 4. Each group begins at the nearest class that is left
    and ends at four times its gap; the last one holds all that is left.
    `class_of_rank` orders classes by how often the pilot keeps them, which makes ranks and their distances small.

    Tail `class-means`: that mass is shared out in proportion to exp(beta class mean) over the classes that are not kept
    (below temperature 0.7 as at 0.7). A class mean is 4 log mean exp(z / 4) over the pilot rows whose tail the class is
    in, with z relative to the row's weakest kept class; it serves temperatures 1 to 4 better than a plain mean. Classes
    masked in every pilot row have the mean -inf and stay masked; a row that masks others is refused.

    Tail `samples`: m tail classes are drawn by systematic sampling with one uniform number a row, a hash of the row and
    the seed. Class i is kept with the probability pi_i = min(1, exp((h - t_i) / sample_temperature)), where t_i is the
    decoded gap below the weakest kept class. Decoded is temperature * log(exp(-beta gap_i) / (pi_i Z)), and -inf for
    classes that are not kept. The weights exp(decoded / temperature) are those of Horvitz and Thompson (1952): the mean
    of any function of the class under them is unbiased at every temperature, for the logits as coded. Those differ from
    the true ones by half a level at most, which moves the sum over the tail by 0.3% on average at temperature 1. The
    weights must not be normalised. Masks may differ from row to row.

    What is lost, in nats, and bytes a row in chunks of 256 rows; fitted on 3,072 rows, measured on rows of other
    examples. KL at temperature 1 / 2 / 4. `uniform` is the same head and exact mass with an even tail; `leftover`
    spreads (1 - kept mass at 1)^(1 / temperature) evenly and costs only `kept_class` and `kept_gap`. Renormalised top-k
    has no finite KL: for it stands its L1 error, next to the one of class means.

    ===================  ==  =====  =====================  =====================  =====================
    teacher              k   bytes  class means            uniform                leftover (bytes)
    ===================  ==  =====  =====================  =====================  =====================
    SmolLM2-135M         8   23.7   1.10 / .738 / .190     1.89 / 1.43 / .387     1.89 / 2.52 / 2.11 (14.9)
    49,152 classes       16  36.3   .849 / .690 / .187     1.42 / 1.33 / .381     1.42 / 2.66 / 2.57 (28.3)
    \                    32  61.1   .631 / .633 / .183     1.04 / 1.22 / .372     1.04 / 2.78 / 3.05 (52.6)
    EfficientNet-Lite0   8   18.1   .537 / .196 / .047     .575 / .206 / .049     .575 / .974 / 1.49 (12.4)
    1,000 classes        16  27.4   .380 / .162 / .041     .405 / .170 / .043     .405 / 1.12 / 1.86 (21.7)
    \                    32  45.0   .244 / .124 / .034     .259 / .130 / .036     .258 / 1.23 / 2.19 (38.9)
    PP-OCRv6 frames      8   18.2   .0005 / .040 / .076    .0022 / .109 / .136    .0022 / .353 / 3.24 (9.7)
    18,710 classes       16  26.2   .0003 / .034 / .074    .0011 / .079 / .125    .0010 / .339 / 3.51 (18.0)
    \                    32  42.0   .0001 / .029 / .071    .0004 / .053 / .114    .0003 / .328 / 3.77 (34.0)
    ===================  ==  =====  =====================  =====================  =====================

    ===================  ==  =====================  =====================  ==========================
    teacher              k   L1 of class means      L1 of renormalised     samples: m, bytes, deviation
    ===================  ==  =====================  =====================  ==========================
    SmolLM2-135M         8   .626 / .819 / .455     .855 / 1.85 / 1.99     8, 48.5, .29 / .01 / .31
    \                    16  .514 / .789 / .453     .706 / 1.80 / 1.98     16, 82.4, .12 / .02 / .26
    EfficientNet-Lite0   8   .601 / .448 / .229     1.22 / 1.83 / 1.95     8, 36.6, .16 / .03 / .12
    \                    16  .487 / .407 / .216     1.06 / 1.75 / 1.91     16, 57.6, .08 / .02 / .08
    PP-OCRv6 frames      8   .0013 / .063 / .243    .0007 / .216 / 1.88    8, 42.0, .001 / .004 / .18
    \                    16  .0011 / .057 / .239    .0004 / .202 / 1.87    16, 70.0, .000 / .005 / .14
    ===================  ==  =====================  =====================  ==========================

    The deviation of samples is the root mean square over rows of (sum of weights - 1): they have no KL, being right on
    average only.

    The log-probability of every kept class is off by its own rounding and by what `log_partition_error` measures, an
    error that all kept classes of a row share. On the rows above, at k from 4 to 32: at every temperature from 1 up at
    most 6e-4 on average and 3e-3 in the worst row; at 0.7 and 0.8, 6e-4 and 3e-3. For bell-shaped rows of a standard
    deviation up to 4 it stays below 0.01 from temperature 0.7 up, at any k. Below 0.7, F is continued along its
    tangent, which makes the tail too light: by up to 0.25 at 0.5. Wide rows, bell-shaped with a standard deviation of
    10 to 1,000 logits, or with half of the classes at a finite -1e4, or in two clumps 25 or 50 logits apart, stay below
    3e-3 from 0.7 up, at 20,000 classes. What stays bad are a few classes of the tail that stand a little nearer than
    all others within one group, and rows that fill more than four groups. `measure` sees all of it, as the KL at
    temperature t of `decode(codes, parameters, temperature=t)`.

    Parameters
    ----------
    spec : TopK
        Names k, the tail and their options. A k above the number of classes keeps all.
    num_classes : int
        Classes of a row, at least 1.

    Raises
    ------
    CodecError
        `num_classes` is below 1.

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 3.0, 0.0, -1.0, -2.0], [-2.0, 5.0, 2.0, -1.0, 0.0]])
    >>> codec = TopKCodec(TopK(k=2), num_classes=5)
    >>> parameters = {name: torch.from_numpy(array) for name, array in codec.fit(logits).items()}
    >>> codes = codec.encode(logits, parameters)
    >>> codes.dtype, codes.shape
    (torch.uint16, torch.Size([2, 72]))
    >>> warm = codec.decode(codes, parameters, temperature=4.0)
    >>> bool((torch.softmax(warm / 4, 1) - torch.softmax(logits / 4, 1)).abs()[:, [0, 1]].amax() < 0.1)
    True
    """

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
        return columns_of(self.spec, self.num_classes)

    def fit(self, pilot: Float[Tensor, "row class"]) -> dict[str, npt.NDArray[Any]]:
        """Rank the classes, find the axes along which tails differ, and average the logits of classes in the tail.

        Computed on the CPU in blocks of rows, in float64.

        Parameters
        ----------
        pilot : Tensor [row, class]
            Logits of the pilot, on any device; -inf is a masked class.

        Returns
        -------
        dict of str to numpy.ndarray
            `class_of_rank`, int64 [class]; `node_mean`, float32 [node]; `node_basis`, float32 [component, node], a
            rotation; and for tail `class-means` `class_means`, float32 [class].

        Raises
        ------
        CodecError
            The pilot has no rows; or, for tail `class-means`, masks a class in some rows and not in others.
        NonFiniteLogitsError
            The pilot holds NaN or +inf, or a row of nothing but -inf.
        ShapeError, WrongClassCountError
            The pilot is no [row, class] array of this codec's classes.
        """
        check_logits(pilot, self.num_classes)
        if pilot.shape[0] == 0:
            raise CodecError("The pilot has no rows: there is nothing to rank the classes by.")
        sums = PilotSums(self.num_classes, self.spec.num_nodes)
        for block in row_blocks(*pilot.shape):
            gaps = self._gaps(pilot[block].cpu(), block.start)
            classes, closest = largest(gaps, self._num_kept)
            tail = separated(gaps, classes, last_finite(closest[:, : self._num_kept]), num_nodes=self.spec.num_nodes)
            sums.add(gaps, classes, tail)
        parameters = sums.common_parameters()
        if not self.is_normalised:
            parameters["class_means"] = sums.class_means(num_kept=self._num_kept)
        return parameters

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are not of this codec.

        Raises
        ------
        CodecError
            A parameter is missing, surplus or malformed; `class_of_rank` is no permutation or `node_basis` no rotation;
            or class means are NaN, +inf or all -inf.
        """
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

    def prepare(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the parameters as they are."""
        return parameters

    prepare_to_encode = prepare

    def encode(
        self, logits: Float[Tensor, "row class"], parameters: Mapping[str, Tensor]
    ) -> Shaped[Tensor, "row column"]:
        """Give every row its kept classes, the log-partition of its tail and, for tail `samples`, drawn classes.

        With a target, every row is decoded and measured at temperatures 1, 2 and 4; rows that break it are refused.
        Equal logits give equal codes, whatever rows stand beside them. Among equal logits the lowest classes are kept.

        Parameters
        ----------
        logits : Tensor [row, class]
            Of any floating-point type. -inf is a masked class, and so is one more than `reach` below its row's maximum.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the logits' device.

        Returns
        -------
        Tensor [row, column]
            uint16, on the logits' device.

        Raises
        ------
        CodecError
            For tail `class-means`, a row masks other classes than the pilot's rows; or the rows break `max_kl`.
        NonFiniteLogitsError
            A row holds NaN or +inf, or nothing but -inf.
        ShapeError, WrongClassCountError
            The logits are no [row, class] array of this codec's classes.
        """
        check_logits(logits, self.num_classes)
        codes = torch.empty(logits.shape[0], self.num_columns, dtype=torch.uint16, device=logits.device)
        class_of_rank = parameters["class_of_rank"]
        rank_of_class = torch.empty_like(class_of_rank)
        rank_of_class[class_of_rank] = torch.arange(self.num_classes, device=logits.device)
        encoder = Encoder(self.spec, parameters, rank_of_class)
        masked = None if self.is_normalised else parameters["class_means"] == -torch.inf
        for block in row_blocks(*logits.shape, max_elements=block_elements(logits.device)):
            gaps = self._gaps(logits[block], block.start)
            if masked is not None:
                refuse_other_masks(gaps, masked, first_row=block.start)
            codes[block] = self.columns.pack(encoder.fields(gaps))
        if self.spec.max_kl is not None and len(logits):
            self._guard(logits.detach(), codes, parameters, self.spec.max_kl)
        return codes

    def _guard(self, logits: Tensor, codes: Tensor, parameters: Mapping[str, Tensor], target: float) -> None:
        """Measure every row as it is decoded at each temperature, and refuse rows that break the target."""
        measured = torch.empty(len(logits), len(TEMPERATURES), dtype=torch.float64)
        for block in row_blocks(*logits.shape, max_elements=_GUARD_ELEMENTS):
            for place, temperature in enumerate(TEMPERATURES):
                decoded = self.decode(codes[block], parameters, temperature=temperature)
                measured[block, place] = measure(logits[block], decoded, [temperature])[:, 0].cpu()
        remedy = f"use Spectral(max_kl={target:g}), a larger k, or Codes()"
        refuse_beyond_target(measured, target, remedy=remedy)

    def decode(
        self, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor], *, temperature: float = 1.0
    ) -> Float32[Tensor, "row class"]:
        """Give temperature * log p at a temperature, or for tail `samples` temperature * log weight.

        Parameters
        ----------
        codes : Tensor [row, column]
            uint16.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the codes' device.
        temperature : float, default 1.0
            The one at which the soft targets are wanted: the tail is another one at each.

        Returns
        -------
        Tensor [row, class]
            float32, on the codes' device; -inf for masked classes and, with tail `samples`, for all that were not kept.
            A hole decodes to NaN.

        Raises
        ------
        CodecError
            The codes have another dtype.
        ShapeError
            The codes have another number of columns.
        TemperatureError
            The temperature is not a finite number above 0.
        """
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

    def head(
        self, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor], *, temperature: float = 1.0
    ) -> tuple[Int64[Tensor, "row place"], Float64[Tensor, "row part"]]:
        """Give the kept classes [row, place], and the log-probabilities of each and, as the last part, of all others.

        A row with fewer than k classes repeats one in its empty places, whose log-probability is -inf. Parameters and
        errors are those of `decode`.
        """
        check_codes(codes, self)
        beta = 1 / checked_temperature(temperature)
        fields = self.columns.unpack(codes)
        kept = self._kept(fields, parameters)
        parts = torch.cat([-beta * kept.gaps, self._log_tail(fields, kept, parameters, beta)[:, None]], dim=1)
        return kept.classes, torch.log_softmax(parts, dim=1)

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
        """Measure how far the decoded tail puts off the row's log-partition: decoded - true, the kept classes the same.

        Times -1, this is the error that all kept classes share in their log-probabilities. It holds interpolation and
        rounding of the tail's log-partition, all that is approximate about the mass of head and tail.

        Parameters
        ----------
        logits : Tensor [row, class]
            The logits that were encoded.
        codes : Tensor [row, column]
            Their codes.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the same device.
        temperature : float, default 1.0
            Where to measure.

        Returns
        -------
        Tensor [row]
            float64, in nats.

        Raises
        ------
        CodecError, NonFiniteLogitsError, ShapeError, TemperatureError, WrongClassCountError
            As for `encode` and `decode`.
        """
        check_logits(logits, self.num_classes)
        check_codes(codes, self)
        beta = 1 / checked_temperature(temperature)
        fields = self.columns.unpack(codes)
        kept = self._kept(fields, parameters)
        of_kept = torch.logsumexp(-beta * kept.gaps, dim=1)
        errors = torch.logaddexp(of_kept, self._log_tail(fields, kept, parameters, beta))
        for block in row_blocks(*logits.shape):
            tail = without(self._gaps(logits[block], block.start).to(torch.float64), kept.classes[block])
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
        return LogPartition(self.spec.num_nodes, HIGHEST_BETA)

    def _gaps(self, logits: Tensor, first_row: int) -> Tensor:
        return gaps_to_maximum(logits.detach(), reach=self.reach, first_row=first_row)

    def _kept(self, fields: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> _Kept:
        codes = fields["kept_gap"]
        empty = codes == EMPTY
        weakest_code = torch.where(empty, 0, codes).amax(dim=1, keepdim=True)
        gaps = self._levels.gaps((weakest_code - codes).clamp(min=0)).masked_fill_(empty, torch.inf)
        classes = self._classes(fields["kept_class"], parameters)
        return _Kept(torch.where(empty, classes[:, :1], classes), gaps, weakest_code)

    def _classes(self, deltas: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters["class_of_rank"][ranks(deltas).clamp(max=self.num_classes - 1)]

    def _log_tail(
        self, fields: Mapping[str, Tensor], kept: _Kept, parameters: Mapping[str, Tensor], beta: float
    ) -> Float64[Tensor, " row"]:
        """Give the log-partition of the tail, of logits whose row's maximum is 0."""
        offsets = signed(fields["node"]).to(torch.float64) @ parameters["node_basis"].to(torch.float64)
        log_mean = self._log_partition.evaluate(offsets * NODE_STEP + parameters["node_mean"], beta)
        if self.is_normalised:
            num_masked = fields["masked_count"][:, 0]
        else:
            num_masked = (parameters["class_means"] == -torch.inf).sum()
        num_far = fields["far_count"]
        num_near = self.num_classes - num_masked - (kept.gaps < torch.inf).sum(dim=1) - num_far.sum(dim=1)
        near = num_near.clamp(min=0).to(torch.float64).log() + log_mean
        coefficients = signed(fields["far_node"]).unflatten(1, (NUM_FAR_GROUPS, self.spec.num_nodes)) * FAR_NODE_STEP
        far = far_log_partition(num_far, fields["far_gap"], coefficients.to(torch.float64), beta)
        return (
            torch.logsumexp(torch.cat([near[:, None], far], dim=1), dim=1)
            - beta * self._levels.gaps(kept.weakest_code)[:, 0]
        )

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
        empty = codes == EMPTY
        weakest = self._levels.gaps(kept.weakest_code)
        gaps = self._levels.gaps(torch.where(empty, 0, codes) + kept.weakest_code) - weakest
        threshold = signed(fields["threshold"][:, 0]) * THRESHOLD_STEP
        probabilities = inclusion_probabilities(gaps, threshold, self.spec.sample_temperature)
        values = -gaps - weakest - temperature * (log_partition[:, None] + probabilities.log())
        classes = torch.where(empty, kept.classes[:, :1], self._classes(fields["drawn_class"], parameters))
        nothing = torch.where(log_partition.isnan(), torch.nan, -torch.inf).to(torch.float32)
        return nothing[:, None].repeat(1, self.num_classes).scatter_(1, classes, values.to(torch.float32))


def _shaped(kept: _Kept, means: Tensor, log_mass: Tensor, temperature: float) -> Tensor:
    """Give temperature * log p, the tail's mass shared out like the class means; wrong as yet for the kept classes."""
    beta = min(1 / temperature, HIGHEST_BETA)  # beyond it, the difference of sums would lose its digits
    rises = means - means.amax()
    weights = (rises.to(torch.float64) * beta).exp_()
    of_kept = torch.where(kept.gaps == torch.inf, 0.0, weights[kept.classes]).sum(dim=1)
    log_scale = log_mass - (weights.sum() - of_kept).clamp(min=0).log()
    shifts = torch.where(log_mass == -torch.inf, -torch.inf, temperature * log_scale).to(torch.float32)
    return (rises * (temperature * beta)).add(shifts[:, None])
