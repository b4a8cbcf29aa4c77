"""The spectral codec: transform coding of logits along the directions in which soft targets feel a change."""

from __future__ import annotations

__all__ = ["GUARD_FACTOR", "NUM_LEVELS", "SpectralCodec"]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Shaped, UInt16
from torch import Tensor

from kdcache.codecs.base import StorageDtype, check_codes, check_logits, check_num_classes, check_row_values, row_blocks
from kdcache.codecs.divergence import TEMPERATURES, divergences
from kdcache.codecs.spectral_fit import Basis, centred, fit_basis, masked_classes, projection_of
from kdcache.documents.codec_specs import Spectral
from kdcache.errors import CodecError

GUARD_FACTOR = 2.0
"""No row's KL may exceed the target by more than this factor."""

NUM_LEVELS = 96
"""Steps that a row may be coded with: each is 2^(1/4) finer than the one before."""

_LEVELS_PER_OCTAVE = 4
_ADAPTATION = 0.25  # of log2(KL) in log2(step): halfway between one step for all rows and one KL for all rows
_LARGEST = 32766  # |code|: its zigzag stays below the fill code
_GUARD_ROUNDS = 24
_STEP_ROUNDS = 6
_DEFAULT_MAX_KL = 0.01
_MAX_HELD_OUT_ROWS = 512
_LEAST_PILOT_ROWS = 8
_MOST_LOGIT = 1e37
_LEAST_STEP, _MOST_STEP = 1e-20, 1e20  # of pilots without any spread
_BLOCK_ELEMENTS = 2**24
_PER_CLASS = ("mean", "basis", "weights")


@dataclass(frozen=True)
class SpectralCodec:
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
        cls, spec: Spectral, num_classes: int, pilot: Float[Tensor, "row class"]
    ) -> tuple[SpectralCodec, dict[str, npt.NDArray[Any]]]:
        """Fit basis and step to a pilot, and make the codec of the rank that was found.

        The last rows of the pilot, an eighth and at most 512, are held out: the step is fitted on them.

        Parameters
        ----------
        spec : Spectral
            With or without a rank.
        num_classes : int
        pilot : Tensor [row, class]
            Finite but for masked classes, on any device; may be a memory map.

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
            raise CodecError("Fewer than 2 classes are unmasked in the pilot: there is nothing to code.")
        open_pilot = pilot[:, ~masked] if bool(masked.any()) else pilot
        _check_values(open_pilot, first_row=0)
        num_held_out = min(_MAX_HELD_OUT_ROWS, len(pilot) // 8)
        found = fit_basis(open_pilot[:-num_held_out], rank=spec.rank)
        codec = cls(spec.model_copy(update={"rank": len(found.basis)}), num_classes)
        parameters = codec._as_parameters(found, masked)
        step = spec.step or codec._fitted_step(pilot[-num_held_out:], parameters, float(found.spread[0]))
        return codec, {name: value.cpu().numpy() for name, value in codec._with_step(parameters, step).items()}

    def with_step(
        self, parameters: Mapping[str, npt.NDArray[Any]], step: float
    ) -> tuple[SpectralCodec, dict[str, npt.NDArray[Any]]]:
        """Give this codec and its parameters with a fixed step, without guard, in place of the fitted one."""
        spec = Spectral.make(**{**dict(self.spec), "max_kl": None, "step": step})
        return replace(self, spec=spec), {**parameters, "steps": self._steps(step).numpy()}

    def with_fitted_step(
        self, parameters: Mapping[str, npt.NDArray[Any]], held_out: Float[Tensor, "row class"]
    ) -> dict[str, npt.NDArray[Any]]:
        """Fit the step anew, for this codec's target, on held-out rows: another target on a basis that is there."""
        tensors = {name: torch.as_tensor(value, device=held_out.device) for name, value in parameters.items()}
        step = self._fitted_step(held_out, tensors, 16 * float(parameters["steps"][self.base_level]))
        return {**parameters, "steps": self._steps(step).numpy()}

    @property
    def num_components(self) -> int:
        """Components of the basis."""
        return self.spec.rank or 0

    @property
    def max_kl(self) -> float | None:
        """The target in nats; None with a fixed step."""
        return None if self.spec.step is not None else self.spec.max_kl or _DEFAULT_MAX_KL

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

    @property
    def depends_on_temperature(self) -> bool:
        """False: the logits serve every temperature."""
        return False

    @property
    def is_normalised(self) -> bool:
        """False: decoded logits are softened by a softmax."""
        return False

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
        if not float(steps[0].double() * _LARGEST * basis.abs().amax().double()) < _MOST_LOGIT:
            raise CodecError("The stored steps and basis reach beyond float32: one of them is altered.")

    def prepare(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the parameters with the basis in the type of the matrix products, so that decoding converts nothing."""
        dtype = torch.bfloat16 if self.spec.precision == "bfloat16" else torch.float32
        return {**parameters, "basis": parameters["basis"].to(dtype)}

    def prepare_to_encode(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add `projection`, float64 [component, component]: coordinates = projection @ (weights basis) @ row."""
        projection = parameters.get("projection")
        if projection is None:
            projection = projection_of(parameters["basis"], parameters["weights"])
        return {**self.prepare(parameters), "projection": projection}

    def encode(
        self, logits: Float[Tensor, "row class"], parameters: Mapping[str, Tensor]
    ) -> UInt16[Tensor, "row column"]:
        """Quantise the rows' coordinates; with a target, decode, measure and refine until it is met.

        Parameters
        ----------
        logits : Tensor [row, class]
            Of any floating-point type; -inf in the masked classes alone.
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
        check_logits(logits, self.num_classes)
        with torch.autocast(logits.device.type, enabled=False):
            return self._encoded(logits.detach(), self.prepare_to_encode(parameters))

    def _encoded(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        opened, kept = self._opened(logits, parameters)
        codes = torch.empty(len(logits), self.num_columns, dtype=torch.uint16, device=logits.device)
        for block in row_blocks(len(logits), self.num_classes, max_elements=_BLOCK_ELEMENTS):
            codes[block] = self._encode_block(opened[block], kept, first_row=block.start)
        return codes

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
        check_codes(codes, self)
        levels = codes[:, -1:].to(torch.int32)
        steps = parameters["steps"][levels.clamp(max=NUM_LEVELS - 1)]
        steps = torch.where(levels < NUM_LEVELS, steps, torch.nan)
        return self._decoded(_unzigzag(codes[:, :-1].view(torch.int16)), steps, self.prepare(parameters))

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
        return (step * 2.0 ** ((self.base_level - levels) / _LEVELS_PER_OCTAVE)).float()

    def _fitted_step(self, held_out: Tensor, parameters: Mapping[str, Tensor], spread: float) -> float:
        """Find the step with which the target is just met before anything is refined."""
        target, step = self.max_kl or _DEFAULT_MAX_KL, max(spread / 16, _LEAST_STEP)
        opened, kept = self._opened(held_out, self.prepare_to_encode(self._with_step(parameters, step)))
        for _ in range(_STEP_ROUNDS):
            now = self._with_step(kept, step)
            coordinates = self._coordinates(opened, now)
            levels = self._levels(opened, now)
            _, measured = self._quantised(opened, coordinates, levels, now)
            step *= float((target / measured.mean(dim=0).amax().clamp(min=1e-12)).sqrt().clamp(1 / 64, 64))
            step = min(max(step, _LEAST_STEP), _MOST_STEP)
        return step

    def _opened(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave masked classes out of logits and parameters."""
        masked = parameters["mean"] == -torch.inf
        if not bool(masked.any()):
            return logits, dict(parameters)
        wrong = ((logits == -torch.inf) != masked).any(dim=1)
        if bool(wrong.any()):
            raise CodecError(
                f"Row {int(wrong.nonzero()[0])} masks other classes (-inf) than the pilot did, and the spectral codec "
                "keeps one mask for all rows. Use Codes() or Lossless(), which keep a mask a row. Nothing was encoded."
            )
        kept = {name: value[..., ~masked] if name in _PER_CLASS else value for name, value in parameters.items()}
        return logits[:, ~masked], kept

    def _encode_block(self, logits: Tensor, parameters: Mapping[str, Tensor], *, first_row: int) -> Tensor:
        _check_values(logits, first_row=first_row)
        coordinates = self._coordinates(logits, parameters)
        levels = self._levels(logits, parameters)
        if self.max_kl is None:
            quantised = _rounded(coordinates, parameters["steps"][levels][:, None])
            _refuse_far(quantised, first_row)
        else:
            quantised = self._guarded(logits, coordinates, levels, parameters, first_row)
        codes = torch.cat([_zigzag(quantised), levels[:, None].to(torch.int32)], dim=1)
        return codes.to(torch.uint16)

    def _guarded(
        self, logits: Tensor, coordinates: Tensor, levels: Tensor, parameters: Mapping[str, Tensor], first_row: int
    ) -> Tensor:
        """Refine rows, in place in `levels`, until none exceeds twice the target and the mean meets it."""
        target = self.max_kl or _DEFAULT_MAX_KL
        reach = coordinates.abs().amax(dim=1) / (parameters["steps"][levels] * _LARGEST)
        coarser = (_LEVELS_PER_OCTAVE * reach.clamp(min=1).log2()).ceil().to(torch.int64)
        levels.sub_(coarser).clamp_(min=0)
        quantised, measured = self._quantised(logits, coordinates, levels, parameters)
        for _ in range(_GUARD_ROUNDS):
            finer = _refinements(measured, target)
            rows = finer.nonzero()[:, 0]
            if not len(rows):
                return quantised
            if bool((levels[rows] + finer[rows] >= NUM_LEVELS).any()):
                break
            levels[rows] += finer[rows]
            quantised[rows], measured[rows] = self._quantised(logits[rows], coordinates[rows], levels[rows], parameters)
        worst = int(measured.amax(dim=1).argmax())
        raise CodecError(
            f"Row {first_row + worst} cannot be coded with max_kl={target:g}: its KL stays at "
            f"{float(measured[worst].amax()):.3g} however fine the step: it lies outside the {self.num_components} "
            "components that the pilot showed, or too far along them. At a new address, use a larger pilot "
            "(num_pilot_rows) or rank, a larger max_kl, or Codes(). Nothing was encoded."
        )

    def _quantised(
        self, logits: Tensor, coordinates: Tensor, levels: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        steps = parameters["steps"][levels][:, None]
        quantised = _rounded(coordinates, steps)
        decoded = self._decoded(quantised, steps, parameters)
        smallest = self.max_kl or _DEFAULT_MAX_KL
        return quantised, divergences(logits, decoded, smallest=smallest)

    def _coordinates(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        rows = centred(logits).sub_(parameters["mean"]).mul_(parameters["weights"])
        basis = parameters["basis"]
        inner = torch.matmul(rows.to(basis.dtype), basis.T)
        return inner.double() @ parameters["projection"]

    def _levels(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Choose each row's level from the noise that its soft targets would feel, relative to the pilot's."""
        levels = torch.full((len(logits),), self.base_level, dtype=torch.int64, device=logits.device)
        if self.max_kl is None:
            return levels
        norms = parameters["basis"].float().square().sum(dim=0)
        usual = (norms * parameters["weights"]).sum() / parameters["weights"].sum()
        felt = torch.empty(len(logits), device=logits.device)
        for block in row_blocks(*logits.shape, max_elements=2**19):
            felt[block] = _felt(logits[block].to(torch.float32), norms)
        coarser = _ADAPTATION * _LEVELS_PER_OCTAVE * (felt / usual).clamp(min=1e-9).log2()
        return (levels + coarser.round().to(torch.int64)).clamp_(0, NUM_LEVELS - 1)

    def _decoded(self, quantised: Tensor, steps: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        basis, mean = parameters["basis"], parameters["mean"]
        with torch.autocast(basis.device.type, enabled=False):
            return self._product(quantised, steps, basis, mean)

    @staticmethod
    def _product(quantised: Tensor, steps: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
        if basis.dtype == torch.bfloat16:
            return torch.matmul(quantised.to(torch.bfloat16), basis).to(torch.float32).mul_(steps).add_(mean)
        if basis.device.type == "cpu":
            return torch.addmm(mean, quantised.to(torch.float32) * steps, basis)
        # an accelerator may round factors to TF32, which holds codes up to 2,048 and a float16 basis exactly
        return torch.addcmul(mean, torch.matmul(quantised.to(torch.float32), basis), steps)


def _refinements(measured: Tensor, target: float) -> Tensor:
    """Say by how many levels each row is to be refined: int64 [row], all 0 where the target is met.

    A level takes KL down by a factor of the square root of 2.
    """
    worst = measured.amax(dim=1)
    excess = worst / (GUARD_FACTOR * target)
    finer = torch.where(excess > 1, (2 * excess.clamp(min=1e-12).log2()).ceil().clamp(min=1), 0).to(torch.int64)
    if bool((finer > 0).any()):
        return finer
    surplus = measured.sum(dim=0) - target * len(measured)
    place = int(surplus.argmax())
    if float(surplus[place]) <= 0:
        return finer
    values, order = measured[:, place].sort(descending=True, stable=True)
    gained = torch.cumsum(values * (1 - 2**-0.5), dim=0)
    count = min(len(order), int((gained < surplus[place]).sum()) + 1)
    finer[order[:count]] = 1
    return finer


def _felt(logits: Tensor, norms: Tensor) -> Tensor:
    """Give the KL, up to a factor, that noise of one variance along all components costs each row.

    The largest over temperatures of sum_i p_i (1 - p_i) |b_i|^2 / temperature^2, with b_i a class's column of the
    basis: the variance of the logit errors under p where the columns of different classes are nearly orthogonal.
    """
    weights = (logits - logits.amax(dim=1, keepdim=True)).div_(4).exp_()
    felt = []
    for temperature in TEMPERATURES[::-1]:
        total = weights.sum(dim=1)
        squares = weights * weights
        felt.append((weights @ norms / total - squares @ norms / total**2) / temperature**2)
        weights = squares
    return torch.stack(felt).amax(dim=0)


def _rounded(coordinates: Tensor, steps: Tensor) -> Tensor:
    """Quantise; what lies beyond the largest code becomes it, which the guard then finds out."""
    return (coordinates / steps).round().clamp_(-_LARGEST, _LARGEST).to(torch.int32)


def _refuse_far(quantised: Tensor, first_row: int) -> None:
    far = (quantised.abs() == _LARGEST).any(dim=1)
    if bool(far.any()):
        raise CodecError(
            f"Row {first_row + int(far.nonzero()[0])} lies more than {_LARGEST} steps along a component: it is far "
            "from the pilot's rows. Use a larger step, a pilot that holds such rows, or Codes(). Nothing was encoded."
        )


def _zigzag(values: Tensor) -> Tensor:
    return (values << 1) ^ (values >> 31)


def _unzigzag(bits: Tensor) -> Tensor:
    """Undo the zigzag on the bits of uint16 codes, in int16: four times faster than in int32."""
    return ((bits >> 1) & 0x7FFF) ^ -(bits & 1)


def _check_values(logits: Tensor, *, first_row: int) -> None:
    """Refuse rows with NaN or +inf, and with -inf where the pilot masked no class."""
    finite = logits.isfinite().all(dim=1)
    if bool(finite.all()):
        return
    check_row_values(logits, first_row=first_row)
    raise CodecError(
        f"Row {first_row + int(finite.logical_not().nonzero()[0])} masks (-inf) a class that other rows do not, and "
        "the spectral codec keeps one mask for all rows. Use Codes() or Lossless(), which keep a mask a row. Nothing "
        "was encoded."
    )
