"""Rows on their way into the spectral codec: their coordinates, how much noise they feel, what coding changed.

Two ways in give the same stored format: rows of logits, which are here, and hidden states of a teacher whose head is
known, which are in `kdcache.codecs.spectral.hidden_rows`.
"""

from __future__ import annotations

__all__ = [
    "PRECISE_CLASSES",
    "SMALLEST_QUICK_KL",
    "MadeRows",
    "SpectralRows",
    "all_rows",
    "class_blocks",
    "decoded_product",
    "encoding_parameters",
    "felt",
    "in_blocks",
    "steps_or_nan",
]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor
from torch.nn import functional

from kdcache.codecs.base import block_elements, row_blocks
from kdcache.codecs.bounds import scaled_bounds
from kdcache.codecs.certificate import error_range, measure
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.head_logits import HeadLogits, Logits, rows_of
from kdcache.codecs.precision import TF32_INTEGERS, keeps_float32
from kdcache.codecs.row_errors import ErrorSums, RowErrors, tile_rows
from kdcache.codecs.spectral.fit import projection_of

PRECISE_CLASSES = 4096
"""Rows of at most so many classes are measured in float64: it costs little there."""

SMALLEST_QUICK_KL = 1e-3
"""Targets below are measured in float64: float32 tells KL apart to about 1e-6."""

_PRODUCT_COLUMNS = 4096
_SAMPLED_CLASSES = 4096
_PRECISE_ELEMENTS = 2**21
_FELT_ELEMENTS = 2**21


class SpectralRows(Protocol):
    """Rows to be coded: those of a shard."""

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        ...

    def __len__(self) -> int: ...

    def coordinates(self) -> Float[Tensor, "row component"]:
        """Give the rows' coordinates along the basis."""
        ...

    def felt(self) -> Float32[Tensor, " row"]:
        """Give the KL, up to a factor, that noise of one variance along all components costs each row."""
        ...

    def errors(
        self, rows: Int[Tensor, " row"], quantised: Int[Tensor, "row component"], steps: Float[Tensor, "row 1"]
    ) -> RowErrors:
        """Say what coding changes in some of the rows, coded so."""
        ...

    def exact_errors(
        self, rows: Int[Tensor, " row"], quantised: Int[Tensor, "row component"], steps: Float[Tensor, "row 1"]
    ) -> RowErrors:
        """Say it with logits in float32: slower, and without doubt from their rounding."""
        ...


def encoding_parameters(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Derive from prepared parameters what encoding needs besides.

    Returns
    -------
    dict of str to Tensor
        `projection` float64 [component, component]: coordinates = projection @ (weights basis) @ row. `likely` int64
        [class]: the classes of largest weight, on which rows are compared, counted without the masked ones. `norms`
        float32 [class], of those: squared length of a class's column of the basis. `usual` float32, their mean.
    """
    is_open = parameters["mean"] != -torch.inf
    weights, basis = parameters["weights"][is_open], parameters["basis"][:, is_open]
    likely = weights.topk(min(_SAMPLED_CLASSES, len(weights))).indices.sort().values
    norms = basis[:, likely].float().square().sum(dim=0)
    return {
        "projection": projection_of(basis, weights),
        "likely": likely,
        "norms": norms,
        "usual": (norms * weights[likely]).sum() / weights[likely].sum(),
    }


@dataclass(frozen=True, eq=False)
class MadeRows:
    """Rows of logits, which are compared in float32 or float64.

    Those of hidden states and a head are made as they are needed: for some rows, and a block of classes at a time.

    Parameters
    ----------
    logits : Tensor [row, class] or HeadLogits
        Finite, without masked classes.
    parameters : Mapping[str, Tensor]
        Prepared to encode, without masked classes.
    smallest : float
        The smallest KL that must be told apart, in nats.
    """

    logits: Logits
    parameters: Mapping[str, Tensor]
    smallest: float

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def device(self) -> torch.device:
        """Where the logits lie."""
        return self.logits.device

    def coordinates(self) -> Float64[Tensor, "row component"]:
        """Project the centred rows, in the metric of the weights, onto the basis."""
        inner = [self._inner(rows_of(self.logits, block)) for block in _tile_row_blocks(len(self.logits), self.device)]
        return (torch.cat(inner) if inner else self._inner(self.logits)) @ self.parameters["projection"]

    def felt(self) -> Float32[Tensor, " row"]:
        """Compare rows over the likely classes."""
        likely = self.parameters["likely"]
        if isinstance(self.logits, HeadLogits):
            return felt(self.logits.of_head(self.logits.head.classes(likely)), self.parameters["norms"])
        sampled = self.logits if len(likely) == self.logits.shape[1] else self.logits.index_select(1, likely)
        return felt(sampled, self.parameters["norms"])

    def errors(self, rows: Tensor, quantised: Tensor, steps: Tensor) -> RowErrors:
        """Decode as a reader does, and compare."""
        wide = self.logits.shape[1] > PRECISE_CLASSES and self.logits.dtype != torch.float64
        kernel = self._quick if wide and self.smallest >= SMALLEST_QUICK_KL else self._precise
        # a slice where it serves: picking rows copies their logits
        index = (lambda block: block) if len(rows) == len(self) else (lambda block: rows[block])
        return in_blocks(
            lambda block: kernel(rows_of(self.logits, index(block)), quantised[block], steps[block]),
            len(rows),
            self.device,
        )

    def exact_errors(self, rows: Tensor, quantised: Tensor, steps: Tensor) -> RowErrors:
        """Give `errors`, which are exact."""
        return self.errors(rows, quantised, steps)

    def _inner(self, logits: Logits) -> Float64[Tensor, "row component"]:
        basis, mean, weights = (self.parameters[name] for name in ("basis", "mean", "weights"))
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        middle = _row_means(logits).to(kind)
        total = torch.zeros(len(logits), len(basis), dtype=torch.float64, device=basis.device)
        for block in class_blocks(logits.shape[1]):
            rows = logits[:, block].to(kind).sub(middle).sub_(mean[block]).mul_(weights[block])
            total += rows.to(basis.dtype) @ basis[:, block].T
        return total

    def _quick(self, logits: Logits, quantised: Tensor, steps: Tensor) -> RowErrors:
        basis, mean = self.parameters["basis"], self.parameters["mean"]
        middle = _row_means(logits).float()
        sums = ErrorSums(self._near_largest(logits), -middle[:, 0], logits.shape[1])
        for block in class_blocks(logits.shape[1]):
            decoded = decoded_product(quantised, steps, basis[:, block], mean[block])
            true = logits[:, block].to(torch.float32)
            for columns, quarter, offsets in sums.tiles(block):
                torch.mul(true[:, columns], 0.25, out=quarter)
                torch.sub(decoded[:, columns], true[:, columns], out=offsets).add_(middle).mul_(0.25)
        found = sums.row_errors()
        lost = found.kl.isfinite().all(dim=1).logical_not().nonzero()[:, 0]
        if len(lost):  # logits so far apart that float32 cannot hold their weights
            found.put(lost, self._precise(rows_of(logits, lost), quantised[lost], steps[lost]))
        return found

    def _near_largest(self, logits: Logits) -> Float32[Tensor, " row"]:
        if not isinstance(logits, HeadLogits):
            return logits.amax(dim=1).float()
        likely = logits.of_head(logits.head.classes(self.parameters["likely"]))
        return likely[:].amax(dim=1)

    def _precise(self, logits: Logits, quantised: Tensor, steps: Tensor) -> RowErrors:
        blocks = list(row_blocks(*logits.shape, max_elements=_PRECISE_ELEMENTS))
        return RowErrors.concatenated(
            [self._precise_block(logits[block], quantised[block], steps[block]) for block in blocks]
        )

    def _precise_block(self, logits: Tensor, quantised: Tensor, steps: Tensor) -> RowErrors:
        decoded = decoded_product(quantised, steps, self.parameters["basis"], self.parameters["mean"])
        kl = measure(logits, decoded, TEMPERATURES)
        return RowErrors(
            kl=kl,
            kl_ceiling=kl,
            scaled_bounds=scaled_bounds(logits, decoded),
            error_range=error_range(logits, decoded),
            lowest_logit=logits.amin(dim=1).float(),
            highest_logit=logits.amax(dim=1).float(),
        )


def steps_or_nan(parameters: Mapping[str, Tensor]) -> Float32[Tensor, " level"]:
    """Give the steps and, for the level of a hole, NaN; they are made once, when the parameters are prepared."""
    made = parameters.get("steps_or_nan")
    return functional.pad(parameters["steps"], (0, 1), value=torch.nan) if made is None else made


def decoded_product(
    quantised: Int[Tensor, "row component"], steps: Tensor, basis: Tensor, mean: Tensor
) -> Float32[Tensor, "row class"]:
    """Give mean + step quantised @ basis, in the basis's precision: of all classes or of some."""
    if basis.dtype == torch.bfloat16:
        return torch.matmul(quantised.to(torch.bfloat16), basis).to(torch.float32).mul_(steps).add_(mean)
    if basis.device.type == "cpu":
        return torch.addmm(mean, quantised.to(torch.float32) * steps, basis)
    return torch.addcmul(mean, _whole_product(quantised.to(torch.float32), basis), steps)


def _whole_product(whole: Tensor, basis: Tensor) -> Float32[Tensor, "row class"]:
    """Multiply whole numbers with a basis of float16 values: in two parts, where TF32 would round larger ones."""
    if not torch.compiler.is_compiling() and keeps_float32(basis.device):
        return torch.matmul(whole, basis)
    large = (whole / TF32_INTEGERS).round() * TF32_INTEGERS
    return torch.matmul(whole - large, basis).add_(torch.matmul(large, basis))


def all_rows(rows: SpectralRows) -> Int[Tensor, " row"]:
    """Give the numbers of all rows."""
    return torch.arange(len(rows), device=rows.device)


def class_blocks(num_classes: int) -> Iterator[slice]:
    """Cut classes into blocks, of which one matrix product makes logits: enough to be quick, few enough to be small."""
    for start in range(0, num_classes, _PRODUCT_COLUMNS):
        yield slice(start, min(start + _PRODUCT_COLUMNS, num_classes))


def _row_means(logits: Logits) -> Float[Tensor, "row 1"]:
    if isinstance(logits, HeadLogits):
        weight, bias = logits.head.means
        return (logits.hidden.double() @ weight + bias)[:, None]
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.mean(dim=1, keepdim=True, dtype=kind)


def _tile_row_blocks(num_rows: int, device: torch.device) -> Iterator[slice]:
    return row_blocks(num_rows, 1, max_elements=tile_rows(device))


def in_blocks(measured: Callable[[slice], RowErrors], num_rows: int, device: torch.device) -> RowErrors:
    """Measure rows in blocks that tiles are made for."""
    blocks = [measured(block) for block in _tile_row_blocks(num_rows, device)]
    return RowErrors.concatenated(blocks) if blocks else RowErrors.of_no_rows(device)


def felt(logits: Logits, norms: Tensor) -> Float32[Tensor, " row"]:
    """Give the KL, up to a factor, that noise of one variance along all components costs each row.

    The largest over temperatures of sum_i p_i (1 - p_i) |b_i|^2 / temperature^2, with b_i a class's column of the
    basis: the variance of the logit errors under p where the columns of different classes are nearly orthogonal.
    """
    found = torch.empty(len(logits), device=logits.device)
    for block in row_blocks(*logits.shape, max_elements=max(_FELT_ELEMENTS, block_elements(logits.device))):
        rows = logits[block].to(torch.float32)
        weights = rows.sub(rows.amax(dim=1, keepdim=True)).div_(4).exp_()
        felt = []
        for temperature in TEMPERATURES[::-1]:
            total = weights.sum(dim=1)
            squares = weights * weights
            felt.append((weights @ norms / total - squares @ norms / total**2) / temperature**2)
            weights = squares
        found[block] = torch.stack(felt).amax(dim=0)
    return found
