"""The lossless codec: the bits of the logits, in a floating-point type that holds them exactly."""

from __future__ import annotations

__all__ = ["LosslessCodec"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Shaped
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
from kdcache.documents.codec_specs import Lossless
from kdcache.errors import CodecError

_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LosslessCodec(LogitCodec):
    """Keeps logits bit for bit; column and class are the same, and there are no parameters.

    Strict: logits that the dtype cannot hold exactly are refused, never rounded. -inf, a masked class, is kept like any
    other. bfloat16, which Zarr has no name for,
    is stored as the uint16 of its bits.

    Parameters
    ----------
    spec : Lossless
        Names the dtype.
    num_classes : int
        Classes of a row, at least 1.

    Raises
    ------
    CodecError
        `num_classes` is below 1.

    Examples
    --------
    >>> codec = LosslessCodec(Lossless(dtype="bfloat16"), num_classes=2)
    >>> codes = codec.encode(torch.tensor([[1.5, -2.0]]), {})
    >>> codes.dtype, codec.decode(codes, {})
    (torch.uint16, tensor([[ 1.5000, -2.0000]]))
    """

    spec: Lossless
    num_classes: int

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)

    @property
    def num_columns(self) -> int:
        """Columns of a row of codes: the classes."""
        return self.num_classes

    @property
    def storage_dtype(self) -> StorageDtype:
        """Type of the codes; "uint16" for bfloat16."""
        return "uint16" if self.spec.dtype == "bfloat16" else self.spec.dtype

    @property
    def fill(self) -> float:
        """NaN, or for bfloat16 the bits 0xFFFF, which are a NaN: no logit has them."""
        return 0xFFFF if self.spec.dtype == "bfloat16" else float("nan")

    def fit(self, pilot: Float[Tensor, "row class"]) -> dict[str, npt.NDArray[Any]]:
        """Check, in blocks of rows, that the pilot can be held exactly; there is nothing to fit.

        Raises
        ------
        CodecError
            The dtype cannot hold a logit exactly.
        NonFiniteLogitsError
            A logit is NaN or +inf, or all of a row are -inf.
        ShapeError, WrongClassCountError
            The pilot is no [row, class] array of this codec's classes.
        """
        check_logits(pilot, self.num_classes)
        check_row_values(pilot)
        if not _holds(self.spec.dtype, pilot):
            raise CodecError(_refusal(pilot, self.spec.dtype))
        return {}

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse any parameters.

        Raises
        ------
        CodecError
            There are parameters.
        """
        if parameters:
            raise CodecError(f"The lossless codec has no parameters, got {sorted(parameters)}.")

    def encode(
        self, logits: Float[Tensor, "row class"], parameters: Mapping[str, Tensor]
    ) -> Shaped[Tensor, "row column"]:
        """Give the logits' bits in the spec's dtype.

        Parameters
        ----------
        logits : Tensor [row, class]
            Any floating-point type whose values the spec's dtype holds exactly.
        parameters : Mapping[str, Tensor]
            Empty.

        Returns
        -------
        Tensor [row, column]
            Of type `storage_dtype`, on the logits' device.

        Raises
        ------
        CodecError
            The dtype cannot hold a logit exactly; the message names a dtype that can.
        NonFiniteLogitsError
            A logit is NaN or +inf, or all of a row are -inf.
        ShapeError, WrongClassCountError
            The logits are no [row, class] array of this codec's classes.
        """
        self.check_parameters(parameters)
        check_logits(logits, self.num_classes)
        check_row_values(logits)
        stored = logits.detach().to(_FLOATS[self.spec.dtype], copy=True)
        if not _equal(stored, logits):
            raise CodecError(_refusal(logits, self.spec.dtype))
        return stored.view(torch.uint16) if self.spec.dtype == "bfloat16" else stored

    def decode(
        self,
        codes: Shaped[Tensor, "row column"],
        parameters: Mapping[str, Tensor],
        *,
        temperature: float = 1.0,  # noqa: ARG002 - every codec takes it
    ) -> Float[Tensor, "row class"]:
        """Give the very logits that were encoded, as float32; a fill code becomes NaN.

        Parameters
        ----------
        codes : Tensor [row, column]
            Of type `storage_dtype`.
        parameters : Mapping[str, Tensor]
            Empty.
        temperature : float, default 1.0
            Ignored: the logits serve every temperature.

        Returns
        -------
        Tensor [row, class]
            float32, on the codes' device.

        Raises
        ------
        CodecError
            The codes have another dtype.
        ShapeError
            The codes have another number of columns.
        """
        check_codes(codes, self)
        self.check_parameters(parameters)
        return self._floats(codes).to(torch.float32, copy=True)

    def is_fill(self, codes: Shaped[Tensor, "row column"]) -> Bool[Tensor, " row"]:
        """Tell for each row whether it holds a NaN, which no encoded row does."""
        check_codes(codes, self)
        return self._floats(codes).isnan().any(dim=1)

    def _floats(self, codes: Tensor) -> Tensor:
        return codes.view(torch.bfloat16) if self.spec.dtype == "bfloat16" else codes


def _equal(stored: Tensor, logits: Tensor) -> bool:
    return all(
        torch.equal(stored[block].to(logits.dtype), logits[block])
        for block in row_blocks(logits.shape[0], logits.shape[1])
    )


def _holds(dtype: str, logits: Tensor) -> bool:
    blocks = (logits[block] for block in row_blocks(logits.shape[0], logits.shape[1]))
    return all(torch.equal(rows.to(_FLOATS[dtype]).to(rows.dtype), rows) for rows in blocks)


def _refusal(logits: Tensor, dtype: str) -> str:
    wider = [name for name in _FLOATS if _holds(name, logits)]
    remedy = (
        f'Use Lossless(dtype="{wider[0]}"), which holds them'
        if wider
        else "No stored dtype holds them: cast the teacher's logits to float32 first"
    )
    return (
        f'Lossless(dtype="{dtype}") cannot hold these {str(logits.dtype).removeprefix("torch.")} logits exactly. '
        f"{remedy}, or use Codes(), whose error is bounded. None of these rows was encoded."
    )
