"""The codes codec: each logit as an integer code of its gap to the row's maximum."""

from __future__ import annotations

__all__ = ["MAX_EXPONENT", "WIDEST_MEAN_SPACING", "CodesCodec"]

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor

from kdcache.codecs.base import (
    BLOCK_ELEMENTS,
    TORCH_DTYPES,
    LogitCodec,
    StorageDtype,
    check_codes,
    check_logits,
    check_num_classes,
    check_row_values,
    row_blocks,
    rows_of_codes,
)
from kdcache.codecs.certificate import LADDER, measure
from kdcache.codecs.divergence import TEMPERATURES, divergences
from kdcache.codecs.guard import refuse_beyond_target
from kdcache.documents.codec_specs import Codes
from kdcache.errors import CodecError

MAX_EXPONENT = 30
"""Largest row exponent: a row may be 2^30 times as wide as the codebook."""

WIDEST_MEAN_SPACING = 4.0
"""Logits that a row may span for each level, on average: codes further apart keep no useful soft targets."""

_MASKED_ROW = 128  # added to the exponent of a row that has masked classes
_LAST_ROW_CODE = 255  # no row has it, nor any above
_MARGIN = 17 / 16  # room above the pilot's rows, so that most later rows need no larger exponent
_NARROWEST = 2.0**-10  # a range of a thousandth of a nat: nothing narrower needs resolving
_CURVATURES = tuple(index / 20 for index in range(20))  # 0 is uniform; at 1 the first level would have no width
_GUARD_ELEMENTS = 2**22
_SEARCH_ELEMENTS = 2**18
_MIN_SEARCH_ROWS = 16
_NAN_BITS = 0x7FC00000


@dataclass(frozen=True)
class CodesCodec(LogitCodec):
    r"""Keeps gap = row maximum - logit as a code: gap is nearly codebook[code] * 2^h, with an exponent h a row.

    - Columns: one code a class, then the row's exponent h. Code 0 is gap 0, exactly: the maximum's class stays on top.
    - codebook[c] = c (a + b c), with b = 0 for uniform spacing. For companded spacing b is chosen on the pilot.
    - h is the smallest for which the row's widest gap fits the codebook: nothing is ever clipped, however far the
      logits move from the pilot. h goes up to 30.
    - A row that spans more than 4 logits a level, 1,012 with uint8 and 262,132 with uint16, is refused: see below.
    - A logit of -inf, a masked class, has a code of its own, 254 or 65,534, and is decoded as -inf. It takes no part in
      gaps, exponent and bound. A row that has any says so: 128 is added to its exponent.
    - Each gap gets the nearest level, so that a row's error range is bounded by its codes alone: `error_range_bound`.
    - The largest code, 255 or 65,535, is reserved for holes. A hole decodes to NaN.
    - With `max_kl`, rows that are encoded together keep to it in the mean, and each to twice of it, at T = 1, 2 and 4,
      or they are refused: a wider row has a coarser step, and no finer one would reach its ends. Rows whose error range
      keeps their KL below the target need no measuring; of the others the KL is measured.

    The coefficients (a, b) are the source; the codebook is made from them and stored for readers that know nothing but
    the table. The two agree bit for bit: b has 8 significant bits, so that b c is exact in float32 and fused and
    separate multiplication and addition round alike. A decoder refuses parameters in which they differ.

    Companded spacing is the default because it is the better one where the probability is, and hardly worse where the
    tail matters. Mean KL in nats of uint8 codes, fitted on half of the rows and measured on the other half:

    ================================  =======  =========  =======  =========  =======  =========
    teacher                           T = 1               T = 2               T = 20
    --------------------------------  ------------------  ------------------  ------------------
    \                                 uniform  companded  uniform  companded  uniform  companded
    ================================  =======  =========  =======  =========  =======  =========
    MNIST, 10 classes                 7.4e-6   3.7e-6     1.0e-5   7.2e-6     9.6e-7   1.1e-6
    EfficientNet-Lite0, 1,000         7.7e-5   6.1e-5     2.6e-5   2.6e-5     2.7e-7   3.0e-7
    PP-OCRv6 frames, 18,710           5.7e-5   3.6e-5     1.1e-4   9.7e-5     2.9e-6   3.1e-6
    SmolLM2-135M tokens, 49,152       7.8e-4   2.4e-4     3.3e-4   2.3e-4     3.7e-6   3.9e-6
    ================================  =======  =========  =======  =========  =======  =========

    With uint16 every figure is about 70,000 times smaller.

    Mask classes with -inf: it costs nothing and is exact. A row's levels are spread over its widest finite gap, so a
    class that is masked with a large negative logit makes all others coarse. Mean KL at T = 1 of 1,000 bell-shaped
    classes of standard deviation 4, one of them masked in that way:

    ======  ======  =======  =======  =======  =======
    masked  -300    -1,000   -1e4     -65,000  -250,000
    ======  ======  =======  =======  =======  =======
    uint8   1.2e-3  4.4e-3   refused  refused  refused
    uint16  1.7e-8  6.5e-8   1.9e-6   6.7e-5   9.3e-4
    ======  ======  =======  =======  =======  =======

    Such rows are refused and not clipped, because no place to clip serves every temperature and every mean: with a
    weight w, a teacher that gives a class up brings the geometric mean down by w times the gap. Write -inf where the
    teacher means that a class is impossible; or use uint16 codes or `Lossless`.

    Parameters
    ----------
    spec : Codes
        Names dtype and spacing.
    num_classes : int
        Classes of a row, at least 1.

    Raises
    ------
    CodecError
        `num_classes` is below 1.
    """

    spec: Codes
    num_classes: int

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)

    @property
    def num_columns(self) -> int:
        """Columns of a row of codes: the classes and the exponent."""
        return self.num_classes + 1

    @property
    def storage_dtype(self) -> StorageDtype:
        """Type of the codes."""
        return self.spec.dtype

    @property
    def fill(self) -> int:
        """Reserved code of a hole: the largest of the type."""
        return 255 if self.spec.dtype == "uint8" else 65535

    @property
    def masked_code(self) -> int:
        """Reserved code of a masked class: the one below `fill`."""
        return self.fill - 1

    @property
    def widest_gap(self) -> float:
        """Logits that a row's unmasked classes may span: 1,012 with uint8 codes, 262,132 with uint16."""
        return WIDEST_MEAN_SPACING * self._last_code

    def fit(self, pilot: Float[Tensor, "row class"]) -> dict[str, npt.NDArray[Any]]:
        """Fit the codebook to the pilot.

        The codebook's range minimises the mean over the pilot's rows of the squared range that each row is coded with,
        to which the KL of fine levels is proportional; so one outlying row does not coarsen all others. The curvature
        of a companded codebook is the one of twenty (0, 0.05, ... 0.95) with the least KL, averaged over the ladder
        of temperatures and over evenly spaced rows of the pilot. Computed on the CPU.

        Parameters
        ----------
        pilot : Tensor [row, class]
            Logits of the pilot, on any device; -inf where a class is masked.

        Returns
        -------
        dict of str to numpy.ndarray
            `coefficients`, float32 [2], a and b; `codebook`, float32 [code], in logits.

        Raises
        ------
        CodecError
            The pilot has no rows, or a row that spans more than `widest_gap`.
        NonFiniteLogitsError
            The pilot holds NaN, +inf, or a row of nothing but -inf.
        ShapeError, WrongClassCountError
            The pilot is no [row, class] array of this codec's classes.
        """
        check_logits(pilot, self.num_classes)
        if pilot.shape[0] == 0:
            raise CodecError("The pilot has no rows: a codebook cannot be fitted.")
        pilot = pilot.detach().cpu()
        check_row_values(pilot)
        widest_gaps = torch.cat([_gaps(pilot[block], masked_gap=0).amax(dim=1) for block in row_blocks(*pilot.shape)])
        self._check_widest(pilot, widest_gaps, limit=self.widest_gap)
        width = _fitted_width(widest_gaps.double().numpy())
        curvature = 0.0 if self.spec.spacing == "uniform" else self._best_curvature(pilot, width)
        return _parameters(width, curvature, last_code=self._last_code)

    def prepare(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add what a row's last code makes of the coefficients: times -2^h, NaN where it is none; ten calls saved."""
        if "row_coefficients" in parameters:
            return parameters
        coefficients = parameters["coefficients"]
        last_codes = torch.arange(_LAST_ROW_CODE + 1, dtype=torch.int32, device=coefficients.device)
        scales = -_power_of_two(last_codes & ~_MASKED_ROW)
        return {**parameters, "row_coefficients": scales[:, None] * coefficients}

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are not a codebook of this codec together with its coefficients.

        Raises
        ------
        CodecError
            A parameter is missing, surplus or malformed, or codebook and coefficients differ.
        """
        expected = {"codebook": (self._last_code + 1,), "coefficients": (2,)}
        found = {name: tuple(value.shape) for name, value in parameters.items()}
        if found != expected:
            raise CodecError(f"The codes codec needs parameters of the shapes {expected}, got {found}.")
        codebook, coefficients = (parameters[name].detach().cpu() for name in ("codebook", "coefficients"))
        if codebook.dtype != torch.float32 or coefficients.dtype != torch.float32:
            raise CodecError(f"Codebook and coefficients must be float32, got {codebook.dtype}, {coefficients.dtype}.")
        linear, quadratic = coefficients.numpy()
        if not (0 < linear < math.inf and 0 <= quadratic < math.inf):
            raise CodecError(f"Coefficients must be finite, a > 0 and b >= 0, got a={linear}, b={quadratic}.")
        if not np.array_equal(_codebook(linear, quadratic, self._last_code), codebook.numpy()):
            raise CodecError(
                "The stored codebook is not c (a + b c) of the stored coefficients: one of them is altered."
            )

    def encode(
        self, logits: Float[Tensor, "row class"], parameters: Mapping[str, Tensor]
    ) -> Shaped[Tensor, "row column"]:
        """Give every logit the code whose level is nearest to its gap, and every row its exponent; check a target.

        Parameters
        ----------
        logits : Tensor [row, class]
            Of any floating-point type; finite, or -inf where a class is masked.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the logits' device.

        Returns
        -------
        Tensor [row, column]
            uint8 or uint16, on the logits' device; the last column holds the exponents.

        Raises
        ------
        CodecError
            A row spans more than `widest_gap`, or is more than 2^30 times as wide as the codebook; or the rows break
            `max_kl`.
        NonFiniteLogitsError
            A logit is NaN or +inf, or all of a row are -inf.
        ShapeError, WrongClassCountError
            The logits are no [row, class] array of this codec's classes.
        """
        check_logits(logits, self.num_classes)
        codes = self._encoded(logits, parameters)
        if self.spec.max_kl is not None and len(logits):
            self._guard(logits.detach(), codes, parameters, self.spec.max_kl)
        return codes

    def _encoded(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        num_rows, num_classes = logits.shape
        last_level = parameters["codebook"][-1]
        codes = torch.empty(num_rows, self.num_columns, dtype=TORCH_DTYPES[self.storage_dtype], device=logits.device)
        for block in row_blocks(num_rows, num_classes):
            gaps, is_masked = _gaps(logits[block].detach()), None
            exponents, do_fit = self._exponents(gaps, last_level)
            if not do_fit:
                gaps, is_masked = self._unmasked_gaps(logits[block].detach(), last_level, first_row=block.start)
                exponents, _ = self._exponents(gaps, last_level)
            scale = _power_of_two(exponents.neg())
            levels = self._nearest(gaps.mul_(scale[:, None]), parameters["coefficients"])
            if is_masked is not None:
                levels.masked_fill_(is_masked, self.masked_code)
                exponents += _MASKED_ROW * is_masked.any(dim=1)
            codes[block, :-1] = levels.to(codes.dtype)
            codes[block, -1] = exponents.to(codes.dtype)
        return codes

    def decode(
        self,
        codes: Shaped[Tensor, "row column"],
        parameters: Mapping[str, Tensor],
        *,
        temperature: float = 1.0,  # noqa: ARG002 - every codec takes it
    ) -> Float32[Tensor, "row class"]:
        """Give -codebook[code] * 2^h, and -inf for a masked class: the logits, shifted to a row's maximum of 0.

        Arithmetic throughout, no table: three passes over the batch (two when uniform), fusible by torch.compile, and
        equal to the table bit for bit. Powers of two scale exactly. On the CPU, only blocks that have a row with masked
        classes are looked through for them.

        Parameters
        ----------
        codes : Tensor [row, column]
            uint8 or uint16.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the codes' device.
        temperature : float, default 1.0
            Ignored: the logits serve every temperature.

        Returns
        -------
        Tensor [row, class]
            float32, on the codes' device. A row whose exponent is the fill code is NaN throughout; a fill code
            elsewhere is found by `is_fill` alone.

        Raises
        ------
        CodecError
            The codes have another dtype.
        ShapeError
            The codes have another number of columns.
        """
        check_codes(codes, self)
        if codes.device.type != "cpu" or torch.compiler.is_compiling() or codes.numel() <= BLOCK_ELEMENTS:
            return self._decode_block(codes, parameters)
        logits = torch.empty(codes.shape[0], self.num_classes, dtype=torch.float32)
        for block in row_blocks(*codes.shape):
            logits[block] = self._decode_block(codes[block], parameters)
        return logits

    def is_fill(self, codes: Shaped[Tensor, "row column"]) -> Bool[Tensor, " row"]:
        """Tell for each row whether it holds the fill code in any column."""
        check_codes(codes, self)
        if self.spec.dtype == "uint16":
            return (codes.view(torch.int16) == -1).any(dim=1)
        return (codes == self.fill).any(dim=1)

    def error_range_bound(
        self, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor]
    ) -> Float32[Tensor, " row"]:
        """Bound each row's error range, max - min over classes of (decoded - true logit), from its codes alone.

        A gap lies within half a spacing of its level, and spacings grow with the code: with the row's largest code m,
        R <= 2^h ((codebook[m+1] - codebook[m]) + (codebook[m] - codebook[m-1])) / 2, which for uniform spacing is the
        step times 2^h. No gap exceeds the last level. Added to it is 2^-22 of the largest gap: four times the rounding
        of a gap in float32. Masked classes have no error. Feed it to `kl_bound` for a bound on KL at every temperature.

        Parameters
        ----------
        codes : Tensor [row, column]
            uint8 or uint16, without holes.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the codes' device.

        Returns
        -------
        Tensor [row]
            float32, in logits.
        """
        check_codes(codes, self)
        codebook = parameters["codebook"]
        levels = codes[:, :-1].to(torch.int32)
        largest = levels.masked_fill_(levels == self.masked_code, 0).amax(dim=1)
        above = largest.clamp(max=self._last_code - 1)
        below = (largest - 1).clamp(min=0)
        spacings = codebook[above + 1] - codebook[above] + codebook[largest] - codebook[below]
        rounding = codebook[above + 1] * 2.0**-22
        return (spacings / 2 + rounding) * _power_of_two(codes[:, -1].to(torch.int32) & ~_MASKED_ROW)

    @property
    def _last_code(self) -> int:
        return self.fill - 2

    def _guard(self, logits: Tensor, codes: Tensor, parameters: Mapping[str, Tensor], target: float) -> None:
        """Refuse rows that break the target; measures those that their error range does not clear."""
        felt = torch.cat([self._kl_bounds(codes[block], parameters) for block in _guard_blocks(logits)])
        is_open = felt.amax(dim=1) > target
        self._measure_rows(felt, is_open, logits, codes, parameters)
        if bool((felt.mean(dim=0) > target).any()):  # bounds stand in it yet
            self._measure_rows(felt, ~is_open, logits, codes, parameters)
        finer = 'Codes(dtype="uint16") or ' if self.spec.dtype == "uint8" else ""
        refuse_beyond_target(felt, target, remedy=f"use {finer}Lossless()")

    def _kl_bounds(self, codes: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Bound KL at the temperatures of the guard, [row, temperature] float64: Hoeffding's lemma, as `kl_bound`."""
        ranges = self.error_range_bound(codes, parameters).to(torch.float64)
        return torch.stack([(ranges / temperature) ** 2 / 8 for temperature in TEMPERATURES], dim=1)

    def _measure_rows(
        self, felt: Tensor, chosen: Tensor, logits: Tensor, codes: Tensor, parameters: Mapping[str, Tensor]
    ) -> None:
        """Put the measured KL of chosen rows in the place of their bounds."""
        for block in _guard_blocks(logits):
            rows = chosen[block].nonzero()[:, 0] + block.start
            if len(rows):
                true, coded = logits[rows], self.decode(rows_of_codes(codes, rows), parameters)
                is_plain = bool(coded.isfinite().all())  # `divergences` takes no masked classes
                if is_plain:
                    felt[rows] = divergences(true, coded, smallest=self.spec.max_kl or 1e-3)
                else:
                    felt[rows] = measure(true, coded, TEMPERATURES)

    def _decode_block(self, codes: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        last_column = codes[:, -1].to(torch.int32)
        linear, quadratic = self._of_rows(last_column, self.prepare(parameters)["row_coefficients"])
        levels = codes[:, :-1]
        # torch casts uint16 to int32 and on to float32 faster than directly
        levels = (levels.to(torch.int32) if levels.dtype == torch.uint16 else levels).to(torch.float32)
        is_masked = levels == self.masked_code if _may_have_masked_classes(last_column) else None
        if self.spec.spacing == "uniform":
            logits = levels.mul_(linear)
        else:
            logits = (levels * quadratic).add_(linear).mul_(levels)
        return logits if is_masked is None else torch.where(is_masked, linear * torch.inf, logits)

    def _of_rows(self, last_column: Tensor, row_coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Give each row's coefficients, [row, 1] each."""
        known = last_column.clamp(max=_LAST_ROW_CODE) if self.spec.dtype == "uint16" else last_column
        linear, quadratic = row_coefficients.index_select(0, known).split(1, dim=1)
        return linear, quadratic

    def _exponents(self, gaps: Tensor, last_level: Tensor) -> tuple[Tensor, bool]:
        """Give each row's exponent [row], and whether all rows fit theirs: no gap is NaN or too wide."""
        widest = gaps.amax(dim=1)
        ratio_bits = (widest / last_level).view(torch.int32)
        exponents = ((ratio_bits - 1 >> 23) - 126).clamp_(0, MAX_EXPONENT)
        exponents += widest > last_level * _power_of_two(exponents)  # the ratio was rounded down
        return exponents, bool(((exponents <= MAX_EXPONENT) & (widest <= self.widest_gap)).all())

    def _unmasked_gaps(self, logits: Tensor, last_level: Tensor, *, first_row: int) -> tuple[Tensor, Tensor]:
        """Give the gaps of rows, 0 for masked classes, and which these are; refuse rows that cannot be coded."""
        check_row_values(logits, first_row=first_row)
        gaps = _gaps(logits, masked_gap=0)
        limit = min(self.widest_gap, float(last_level) * 2.0**MAX_EXPONENT)
        self._check_widest(logits, gaps.amax(dim=1), limit=limit, first_row=first_row)
        return gaps, logits.isneginf()

    def _check_widest(self, logits: Tensor, widest_gaps: Tensor, *, limit: float, first_row: int = 0) -> None:
        worst = int(widest_gaps.argmax())
        if not float(widest_gaps[worst]) <= limit:
            lowest = int(logits[worst].masked_fill(logits[worst].isneginf(), torch.inf).argmin())
            raise CodecError(
                f"Row {first_row + worst} spans {float(widest_gaps[worst]):.6g} logits, from class "
                f"{int(logits[worst].argmax())} down to class {lowest}; {self._reach(limit)} If the teacher masks "
                "classes with a large negative logit, give -inf instead, which is kept exactly and costs nothing; "
                f"otherwise use {self._finer}Lossless(). None of these rows was encoded."
            )

    def _reach(self, limit: float) -> str:
        if limit < self.widest_gap:
            return f"this codebook reaches {limit:.6g} at most, so it was fitted on a pilot without such rows."
        return f"{self.spec.dtype} codes reach {limit:.6g} at most, because wider rows lose their soft targets."

    @property
    def _finer(self) -> str:
        return 'Codes(dtype="uint16"), which reach 262,132, or ' if self.spec.dtype == "uint8" else ""

    def _nearest(self, gaps: Tensor, coefficients: Tensor) -> Tensor:
        linear, quadratic = coefficients.unbind()
        root = (gaps * (4 * quadratic)).add_(linear * linear).sqrt_().add_(linear)
        lower = gaps.mul(2).div_(root).floor_().clamp_(0, self._last_code - 1)
        upper = lower + 1
        below = gaps - (lower * quadratic).add_(linear).mul_(lower)
        above = (upper * quadratic).add_(linear).mul_(upper).sub_(gaps)
        return lower.add_(above < below).to(torch.int32)

    def _best_curvature(self, pilot: Tensor, width: float) -> float:
        num_rows = max(_MIN_SEARCH_ROWS, _SEARCH_ELEMENTS // self.num_classes)
        rows = np.unique(np.linspace(0, pilot.shape[0] - 1, num_rows).round().astype(np.int64))
        sample = pilot[torch.from_numpy(rows)]
        return min(_CURVATURES, key=lambda curvature: self._mean_kl(sample, width, curvature))

    def _mean_kl(self, logits: Tensor, width: float, curvature: float) -> float:
        arrays = _parameters(width, curvature, last_code=self._last_code)
        parameters = {name: torch.from_numpy(array) for name, array in arrays.items()}
        decoded = self.decode(self._encoded(logits, parameters), parameters)
        return float(measure(logits, decoded, LADDER).mean())


def _guard_blocks(logits: Tensor) -> Iterator[slice]:
    return row_blocks(*logits.shape, max_elements=_GUARD_ELEMENTS)


def _gaps(logits: Tensor, *, masked_gap: float | None = None) -> Tensor:
    """Give each class's gap [row, class]; that of masked classes is infinite where `masked_gap` is absent."""
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    gaps = (wide.amax(dim=1, keepdim=True) - wide).to(torch.float32)
    return gaps if masked_gap is None else gaps.masked_fill_(logits.isneginf(), masked_gap)


def _may_have_masked_classes(last_column: Tensor) -> bool:
    """Tell whether rows may have masked classes; elsewhere than on the CPU looking would cost more than it saves."""
    if last_column.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return last_column.numel() > 0 and int(last_column.max()) >= _MASKED_ROW


def _fitted_width(widest_gaps: npt.NDArray[np.float64]) -> float:
    """Choose the range with the least mean square over rows of (range * 2^h), among the rows' own gaps."""
    quantiles = np.quantile(widest_gaps, np.linspace(0, 1, 129), method="nearest")
    candidates = np.maximum(np.unique(quantiles) * _MARGIN, _NARROWEST)
    ratios = widest_gaps[None, :] / candidates[:, None]
    exponents = np.ceil(np.log2(np.maximum(ratios, 1)))
    costs = np.mean((candidates[:, None] * 2.0**exponents) ** 2, axis=1)
    return float(candidates[np.argmin(costs)])


def _parameters(width: float, curvature: float, *, last_code: int) -> dict[str, npt.NDArray[np.float32]]:
    quadratic = np.float32(_eight_significant_bits(width * curvature / last_code**2))
    linear = np.float32(width / last_code - float(quadratic) * last_code)
    return {
        "codebook": _codebook(linear, quadratic, last_code),
        "coefficients": np.array([linear, quadratic], dtype=np.float32),
    }


def _codebook(linear: np.float32, quadratic: np.float32, last_code: int) -> npt.NDArray[np.float32]:
    code = np.arange(last_code + 1, dtype=np.float32)
    return code * (linear + quadratic * code)


def _eight_significant_bits(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Give 2^exponent exactly, by its bits, for -30 to 30; NaN elsewhere, as in holes."""
    bits = torch.where(exponents.abs() <= MAX_EXPONENT, (exponents + 127) << 23, _NAN_BITS)
    return bits.view(torch.float32)
