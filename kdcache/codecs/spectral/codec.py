"""The spectral codec: transform coding of logits along the directions in which soft targets feel a change."""

from __future__ import annotations

__all__ = ["NUM_LEVELS", "SpectralCodec"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Shaped, UInt16
from torch import Tensor

from kdcache.codecs.base import (
    LogitCodec,
    StorageDtype,
    check_codes,
    check_logits,
    check_num_classes,
    check_row_values,
    row_blocks,
)
from kdcache.codecs.guard import DEFAULT_MAX_KL, guarded_kl
from kdcache.codecs.head_logits import HeadLogits, Logits, rows_of
from kdcache.codecs.row_errors import RowErrors
from kdcache.codecs.spectral.fit import Basis, fit_basis, masked_classes
from kdcache.codecs.spectral.guard import (
    LARGEST_CODE,
    LEVELS_PER_OCTAVE,
    NUM_LEVELS,
    guarded,
    mean_after_guard,
    refuse_far,
    rounded,
)
from kdcache.codecs.spectral.hidden_rows import HeadRows, PreparedHead
from kdcache.codecs.spectral.masks import as_index, opened
from kdcache.codecs.spectral.rows import (
    MadeRows,
    SpectralRows,
    all_rows,
    decoded_product,
    encoding_parameters,
    steps_or_nan,
)
from kdcache.codecs.spectral.zigzag import scaled, unzigzag, zigzag
from kdcache.documents.codec_specs import Spectral
from kdcache.errors import CodecError, NonFiniteLogitsError

_ADAPTATION = 0.25  # of log2(KL) in log2(step): halfway between one step for all rows and one KL for all rows
_AIM = 0.97  # of the target: so that the mean over a block, which varies, rarely asks for finer rows
_STEP_ROUNDS = 6
_MAX_HELD_OUT_ROWS = 512
_LEAST_PILOT_ROWS = 8
_MOST_LOGIT = 1e37
_LEAST_STEP, _MOST_STEP = 1e-20, 1e20  # of pilots without any spread
_BLOCK_ELEMENTS = 2**24
_PER_CLASS = ("mean", "basis", "weights")


@dataclass(frozen=True)
class SpectralCodec(LogitCodec):
    r"""Keeps a row's coordinates along principal axes of the logits, quantised with one step.

    Logits of a network with d hidden units lie in d dimensions however many classes there are. A row is centred over
    its classes, the mean row `mean` is taken off, and what is left is written in a basis of r components:
    q = round(coordinates / step). Decoded is mean + step q @ basis. One step for all components is reverse
    water-filling: components below the step become zeros, which cost nothing once compressed.

    - Axes. The basis diagonalises the logits' covariance in the metric of the KL itself: the Fisher information
      E[diag(p) - p p^T] / T^2 of the pilot's soft targets, summed over T = 1, 2, 4. Equal quantisation noise along its
      axes costs equal KL, so that the coordinates are those in which one step is right for all.
    - Steps. Each row has a level: its step is steps[level], 2^(1/4) apart. Rows whose probability is spread, and which
      therefore feel noise more, get finer steps, peaked rows coarser ones.
    - Guard. With `max_kl` every row's KL at T = 1, 2 and 4 is measured on the decoded values. A row above twice the
      target is coded again with a finer step; then, where the mean over the block of rows exceeds the target, the worst
      rows are made finer until it does not. So the target holds in the mean over every block, and twice the target in
      every row, on whatever data; not only on data like the pilot.
    - Columns: r codes in zigzag (0, -1, 1, -2 -> 0, 1, 2, 3), then the level; uint16; 65,535 is reserved for holes.

    Classes that are masked (-inf) in every row of the pilot are masked in every row; a row that masks others is
    refused.

    Parameters
    ----------
    spec : Spectral
        `max_kl`, or `step` for a fixed step without guard; `precision` of the matrix products; and the `rank`.
    num_classes : int
        Classes of a row, at least 2.

    Raises
    ------
    CodecError
        `num_classes` is below 2, or the spec names no rank: `fitted` finds it.
    """

    spec: Spectral
    num_classes: int

    base_level: ClassVar[int] = 16
    """The level of the fitted step: 16 times finer than the coarsest, a million times coarser than the finest."""

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)
        if self.num_classes < 2:
            raise CodecError("The spectral codec needs at least 2 classes; one class has nothing to code.")
        if self.spec.rank is None:
            raise CodecError(
                "How many columns a spectral codec has is known once it is fitted, or from Spectral(rank=)."
            )

    @classmethod
    def fitted(
        cls, spec: Spectral, num_classes: int, pilot: Logits
    ) -> tuple[SpectralCodec, dict[str, npt.NDArray[Any]]]:
        """Fit basis and step to a pilot, and make the codec of the rank that was found.

        The last rows of the pilot, an eighth and at most 512, are held out: the step is fitted on them.

        Parameters
        ----------
        spec : Spectral
            With or without a rank.
        num_classes : int
        pilot : Tensor [row, class] or HeadLogits
            Finite but for masked classes, on any device; may be a memory map. Of a head, the basis spans all that it
            can give.

        Returns
        -------
        SpectralCodec
        dict of str to numpy.ndarray
            `mean` float32 [class], `basis` float16 [component, class], `weights` float32 [class], `steps` float32
            [level].

        Raises
        ------
        CodecError
            The pilot has fewer than 8 rows or 2 unmasked classes, or the target cannot be met.
        NonFiniteLogitsError
            The pilot holds NaN or +inf.
        ShapeError, WrongClassCountError
            The pilot is no [row, class] array of so many classes.
        """
        check_logits(pilot, num_classes)
        if len(pilot) < _LEAST_PILOT_ROWS:
            raise CodecError(
                f"The pilot has {len(pilot)} rows; a basis and its step need at least {_LEAST_PILOT_ROWS}. For so few "
                "rows use Codes() or Lossless()."
            )
        masked = masked_classes(pilot)
        if int(masked.sum()) > num_classes - 2:
            raise CodecError(
                "Fewer than 2 classes are unmasked in the pilot: there is nothing to code. Look at the teacher's masks "
                "(-inf), or use Codes() or Lossless(), which keep such rows."
            )
        open_pilot = _of_classes(pilot, ~masked) if bool(masked.any()) else pilot
        _check_values(open_pilot)
        num_held_out = min(_MAX_HELD_OUT_ROWS, len(pilot) // 8)
        with torch.autocast(pilot.device.type, enabled=False), torch.no_grad():
            found = fit_basis(rows_of(open_pilot, slice(None, -num_held_out)), rank=spec.rank)
            codec = cls(spec.model_copy(update={"rank": len(found.basis)}), num_classes)
            parameters = codec._as_parameters(found, masked)
            step = spec.step or codec._fitted_step(
                rows_of(pilot, slice(-num_held_out, None)), parameters, float(found.spread[0])
            )
        return codec, {name: value.cpu().numpy() for name, value in codec._with_step(parameters, step).items()}

    def with_step(
        self, parameters: Mapping[str, npt.NDArray[Any]], step: float
    ) -> tuple[SpectralCodec, dict[str, npt.NDArray[Any]]]:
        """Give this codec and its parameters with a fixed step, without guard, in place of the fitted one."""
        spec = Spectral.make(**{**dict(self.spec), "max_kl": None, "step": step})
        return replace(self, spec=spec), {**parameters, "steps": self._steps(step).numpy()}

    def with_fitted_step(
        self, parameters: Mapping[str, npt.NDArray[Any]], held_out: Logits
    ) -> dict[str, npt.NDArray[Any]]:
        """Fit the step anew, for this codec's target, on held-out rows: another target on a basis that is there."""
        tensors = {name: torch.as_tensor(value, device=held_out.device) for name, value in parameters.items()}
        with torch.autocast(held_out.device.type, enabled=False), torch.no_grad():
            step = self._fitted_step(held_out, tensors, 16 * float(parameters["steps"][self.base_level]))
        return {**parameters, "steps": self._steps(step).numpy()}

    @property
    def num_components(self) -> int:
        """Components of the basis."""
        return self.spec.rank or 0

    @property
    def max_kl(self) -> float | None:
        """The target in nats; None with a fixed step."""
        return guarded_kl(self.spec)

    @property
    def num_columns(self) -> int:
        """Columns of a row of codes: the components and the level."""
        return self.num_components + 1

    @property
    def storage_dtype(self) -> StorageDtype:
        """Type of the codes: uint16."""
        return "uint16"

    @property
    def fill(self) -> int:
        """Reserved code of a hole: 65,535."""
        return 65535

    def fit(self, pilot: Float[Tensor, "row class"]) -> dict[str, npt.NDArray[Any]]:
        """Fit to the pilot a basis of exactly this codec's rank; see `fitted`.

        Raises
        ------
        CodecError
            The pilot shows fewer components than the rank; and as `fitted`.
        NonFiniteLogitsError, ShapeError, WrongClassCountError
            As `fitted`.
        """
        codec, parameters = self.fitted(self.spec, self.num_classes, pilot)
        if codec.num_components != self.num_components:
            raise CodecError(
                f"The pilot shows {codec.num_components} components, fewer than rank={self.num_components}. Leave the "
                "rank out, or use a larger pilot."
            )
        return parameters

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are not a basis of this codec.

        Raises
        ------
        CodecError
            A parameter is missing, surplus, or has another shape, dtype or value than this codec writes.
        """
        rank, classes = self.num_components, self.num_classes
        expected = {
            "mean": ((classes,), torch.float32),
            "basis": ((rank, classes), torch.float16),
            "weights": ((classes,), torch.float32),
            "steps": ((NUM_LEVELS,), torch.float32),
        }
        found = {name: (tuple(value.shape), value.dtype) for name, value in parameters.items()}
        if found != expected:
            raise CodecError(f"The spectral codec needs the parameters {expected}, got {found}.")
        steps = parameters["steps"]
        if not bool(torch.isfinite(steps).all() & (steps > 0).all() & (steps.diff() < 0).all()):
            raise CodecError("The stored steps must be positive and descending: one of them is altered.")
        mean, basis = parameters["mean"], parameters["basis"]
        if not bool(torch.isfinite(basis).all() & ((mean == -torch.inf) | torch.isfinite(mean)).all()):
            raise CodecError("The stored basis or mean holds NaN or an infinity: it is altered.")
        if int(torch.isfinite(mean).sum()) < 2 or not bool(torch.isfinite(parameters["weights"]).all()):
            raise CodecError("The stored mean masks all classes, or the weights hold NaN: one of them is altered.")
        if not float(steps[0].double() * LARGEST_CODE * basis.abs().amax().double()) < _MOST_LOGIT:
            raise CodecError("The stored steps and basis reach beyond float32: one of them is altered.")

    def prepare(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the parameters with the basis in the type of the matrix products, so that decoding converts nothing."""
        dtype = torch.bfloat16 if self.spec.precision == "bfloat16" else torch.float32
        return {**parameters, "basis": parameters["basis"].to(dtype), "steps_or_nan": steps_or_nan(parameters)}

    def prepare_to_encode(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add what encoding needs besides; see `kdcache.codecs.spectral.rows.encoding_parameters`.

        Masked classes are left out here, once, since that copies the basis; `is_open` then says which are not masked.
        """
        if "projection" in parameters:
            return dict(parameters)
        prepared = self.prepare(parameters)
        is_open = prepared["mean"] != -torch.inf
        if not bool(is_open.all()):
            index = as_index(is_open)
            kept = {name: prepared[name][..., index] for name in _PER_CLASS}
            prepared = {**prepared, **kept, "is_open": is_open}
        return {**prepared, **encoding_parameters(prepared)}

    def encode(self, logits: Logits, parameters: Mapping[str, Tensor]) -> UInt16[Tensor, "row column"]:
        """Quantise the rows' coordinates; with a target, decode, measure and refine until it is met.

        Parameters
        ----------
        logits : Tensor [row, class] or HeadLogits
            Of any floating-point type; -inf in the masked classes alone. Of hidden states and a head, the logits are
            never made but a block of rows and classes at a time.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the logits' device, prepared or not.

        Returns
        -------
        Tensor [row, column]
            uint16. The mean over these rows of KL at T = 1, 2 and 4 is at most `max_kl`, and none exceeds twice of it.

        Raises
        ------
        CodecError
            A row masks other classes than the pilot, or lies so far outside the basis that no step meets the target.
        NonFiniteLogitsError
            A logit is NaN or +inf.
        ShapeError, WrongClassCountError
            The logits are no [row, class] array of this codec's classes.
        """
        return self._encoded(logits, parameters, with_errors=False)[0]

    def encode_measured(
        self, logits: Logits, parameters: Mapping[str, Tensor]
    ) -> tuple[UInt16[Tensor, "row column"], RowErrors]:
        """Encode as `encode` does, and say of every row what that changed: the guard has measured it anyway.

        Raises
        ------
        CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError
            As `encode`.
        """
        codes, errors = self._encoded(logits, parameters, with_errors=True)
        return codes, cast("RowErrors", errors)

    def row_errors(
        self, logits: Logits, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor]
    ) -> RowErrors:
        """Say of every row what these codes of it change.

        Raises
        ------
        CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError
            As `encode` and `decode`.
        """
        check_logits(logits, self.num_classes)
        check_codes(codes, self)
        with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
            kept = self.prepare_to_encode(parameters)
            open_logits = opened(logits, kept)
            _check_values(open_logits)
            rows = self._rows(open_logits, kept)
            steps = kept["steps"][codes[:, -1].to(torch.int64).clamp(max=NUM_LEVELS - 1)][:, None]
            quantised = unzigzag(codes[:, :-1].view(torch.int16)).to(torch.int32)
            return rows.errors(all_rows(rows), quantised, steps)

    def _encoded(
        self, logits: Logits, parameters: Mapping[str, Tensor], *, with_errors: bool
    ) -> tuple[Tensor, RowErrors | None]:
        check_logits(logits, self.num_classes)
        with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
            kept = self.prepare_to_encode(parameters)
            open_logits = opened(logits, kept)
            _check_values(open_logits)
            rows = self._rows(open_logits, kept)
            coordinates, levels = rows.coordinates(), self._levels(rows, kept)
            errors: RowErrors | None = None
            if self.max_kl is None:
                steps = kept["steps"][levels][:, None]
                quantised = rounded(coordinates, steps)
                refuse_far(quantised)
                errors = rows.errors(all_rows(rows), quantised, steps) if with_errors else None
            else:
                quantised, errors = guarded(rows, coordinates, levels, kept["steps"], self.max_kl)
            codes = torch.cat([zigzag(quantised), levels[:, None].to(torch.int32)], dim=1)
            return codes.to(torch.uint16), errors

    def decode(
        self,
        codes: Shaped[Tensor, "row column"],
        parameters: Mapping[str, Tensor],
        *,
        temperature: float = 1.0,  # noqa: ARG002 - every codec takes it
    ) -> Float32[Tensor, "row class"]:
        """Give mean + step q @ basis: the logits, centred over their classes up to rounding.

        One matrix product; `prepare` the parameters once and it converts nothing.

        Parameters
        ----------
        codes : Tensor [row, column]
            uint16.
        parameters : Mapping[str, Tensor]
            Of `fit`, on the codes' device, prepared or not.
        temperature : float, default 1.0
            Ignored: the logits serve every temperature.

        Returns
        -------
        Tensor [row, class]
            float32, on the codes' device; -inf in masked classes; NaN in holes.

        Raises
        ------
        CodecError
            The codes have another dtype.
        ShapeError
            The codes have another number of columns.
        """
        prepared = self.prepare(parameters)
        bits, steps = self._bits_and_steps(codes, prepared)
        return self._decoded(unzigzag(bits), steps, prepared)

    def coordinates(
        self, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor]
    ) -> Float32[Tensor, "row component"]:
        """Give the coded coordinates along the basis, before the matrix product; NaN in holes.

        Raises
        ------
        CodecError, ShapeError
            As `decode`.
        """
        return scaled(*self._bits_and_steps(codes, parameters))

    def _bits_and_steps(self, codes: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        check_codes(codes, self)
        levels = codes[:, -1].to(torch.int32).clamp_(max=NUM_LEVELS)
        return codes[:, :-1].view(torch.int16), steps_or_nan(parameters).index_select(0, levels)[:, None]

    def is_fill(self, codes: Shaped[Tensor, "row column"]) -> Bool[Tensor, " row"]:
        """Tell for each row whether it holds the reserved fill code in any column."""
        check_codes(codes, self)
        return (codes.to(torch.int32) == self.fill).any(dim=1)

    def _as_parameters(self, found: Basis, masked: Tensor) -> dict[str, Tensor]:
        kept = ~masked
        mean = torch.full((self.num_classes,), -torch.inf, device=masked.device)
        basis = torch.zeros(self.num_components, self.num_classes, dtype=torch.float16, device=masked.device)
        weights = torch.zeros(self.num_classes, device=masked.device)
        mean[kept], basis[:, kept], weights[kept] = found.mean, found.basis, found.weights
        return {"mean": mean, "basis": basis, "weights": weights}

    def _with_step(self, parameters: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
        return {**parameters, "steps": self._steps(step).to(parameters["mean"].device)}

    def _steps(self, step: float) -> Tensor:
        levels = torch.arange(NUM_LEVELS, dtype=torch.float64)
        return (step * 2.0 ** ((self.base_level - levels) / LEVELS_PER_OCTAVE)).float()

    def _fitted_step(self, held_out: Logits, parameters: Mapping[str, Tensor], spread: float) -> float:
        """Find the step with which the guard, once it has refined the worst rows, leaves the mean just met."""
        target, step = self.max_kl or DEFAULT_MAX_KL, max(spread / 16, _LEAST_STEP)
        kept = self.prepare_to_encode(self._with_step(parameters, step))
        rows = self._rows(opened(held_out, kept), kept)
        coordinates, levels = rows.coordinates(), self._levels(rows, kept)
        for _ in range(_STEP_ROUNDS):
            steps = self._steps(step).to(coordinates.device)[levels][:, None]
            errors = rows.errors(all_rows(rows), rounded(coordinates, steps), steps)
            measured = float(mean_after_guard(errors, target))
            if not math.isfinite(measured):
                raise CodecError(
                    f"The step cannot be fitted: coded with step {step:.3g}, the pilot's rows held out have a KL that "
                    "is no number. Their logits span more than float32 can tell apart; use Codes() or Lossless()."
                )
            step *= min(max((_AIM * target / measured) ** 0.5, 1 / 64), 64.0)
            step = min(max(step, _LEAST_STEP), _MOST_STEP)
        return step

    def _rows(self, logits: Logits, parameters: Mapping[str, Tensor]) -> SpectralRows:
        """Choose the way in: hidden states as they are where they serve, rows of logits else."""
        smallest = self.max_kl or DEFAULT_MAX_KL
        if isinstance(logits, HeadLogits):
            # rounded products of `precision` are to be measured as readers make them
            is_quick = self.spec.precision == "float32" and HeadRows.can_measure(self.num_classes, smallest=smallest)
            if is_quick:
                return HeadRows(logits, PreparedHead.kept(logits.head, parameters), parameters, smallest)
        return MadeRows(logits, parameters, smallest)

    def _levels(self, rows: SpectralRows, parameters: Mapping[str, Tensor]) -> Tensor:
        """Choose each row's level from the noise that its soft targets would feel, relative to the pilot's."""
        levels = torch.full((len(rows),), self.base_level, dtype=torch.int64, device=parameters["steps"].device)
        if self.max_kl is None:
            return levels
        coarser = _ADAPTATION * LEVELS_PER_OCTAVE * (rows.felt() / parameters["usual"]).clamp(min=1e-9).log2()
        return (levels + coarser.round().to(torch.int64)).clamp_(0, NUM_LEVELS - 1)

    def _decoded(self, quantised: Tensor, steps: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(quantised.device.type, enabled=False):
            return decoded_product(quantised, steps, parameters["basis"], parameters["mean"])


def _of_classes(logits: Logits, index: Tensor) -> Logits:
    return logits.of_classes(index) if isinstance(logits, HeadLogits) else logits[:, index]


def _check_values(logits: Logits) -> None:
    """Refuse rows with NaN or +inf, and with -inf where the pilot masked no class."""
    if isinstance(logits, HeadLogits):
        logits.head.check_values()
    values = logits.hidden if isinstance(logits, HeadLogits) else logits
    for block in row_blocks(*values.shape, max_elements=_BLOCK_ELEMENTS):
        rows = values[block]
        if bool(rows.sum(dtype=torch.float32).isfinite()):  # one number tells, but where the sum overflows
            continue
        finite = rows.isfinite().all(dim=1)
        if bool(finite.all()):
            continue
        if isinstance(logits, HeadLogits):
            raise NonFiniteLogitsError(
                f"Row {block.start + int(finite.logical_not().nonzero()[0])} has a hidden state that is NaN or "
                "infinite: it has no soft targets. None of these rows was encoded."
            )
        check_row_values(rows, first_row=block.start)
        raise CodecError(
            f"Row {block.start + int(finite.logical_not().nonzero()[0])} masks (-inf) a class that other rows do not, "
            "and the spectral codec keeps one mask for all rows. Use Codes() or Lossless(), which keep a mask a row. "
            "None of these rows was encoded."
        )
