"""What reduced precision of the matrix products does to codec `Spectral`, on recorded tokens of SmolLM2.

TF32, which accelerators may use for products of float32, rounds both factors to 11 significant bits, bfloat16 to 8;
sums are kept in float32. So both are imitated here, on any processor. KL is in nats; the largest of the means at
temperatures 1, 2 and 4.
"""

from __future__ import annotations

__all__ = ["run"]

from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from benchmarks.fidelity.subjects import open_subject
from kdcache.codecs import Decoder, SpectralCodec, measure, parameters_to
from kdcache.documents import Spectral

TEMPERATURES: Final = (1.0, 2.0, 4.0)
TARGETS: Final = (0.02, 0.001)
_HELD_OUT_SHARE: Final = 1 / 3
_TF32: Final = 11
_BFLOAT16: Final = 8


def run() -> list[dict[str, Any]]:
    """Decode the same codes in every precision; then code in TF32 what is decoded in float32."""
    subject = open_subject("smollm2", share=_HELD_OUT_SHARE)
    codec, parameters = SpectralCodec.fitted(Spectral(max_kl=TARGETS[0]), subject.num_classes, subject.pilot)
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        aimed = SpectralCodec(codec.spec.model_copy(update={"max_kl": target}), codec.num_classes)
        tensors = parameters_to(aimed.with_fitted_step(parameters, subject.pilot[-256:]), "cpu")
        rows += _rows(aimed, tensors, subject.held_out, target)
    return rows


def _rows(
    codec: SpectralCodec, parameters: dict[str, Tensor], logits: Float[Tensor, "row class"], target: float
) -> list[dict[str, Any]]:
    decoder = Decoder(codec, parameters)
    codes = decoder.encode(logits)
    full = decoder.decode(codes)
    in_tf32 = Decoder(_CodesInTf32(codec.spec, codec.num_classes), parameters).encode(logits)
    bfloat16 = SpectralCodec(codec.spec.model_copy(update={"precision": "bfloat16"}), codec.num_classes)
    in_bfloat16 = Decoder(bfloat16, parameters)
    own = in_bfloat16.encode(logits)
    cases = {
        "float32": (codes, full),
        "decoded in TF32, steps x codes rounded": (codes, _decoded(codes, parameters, _TF32, steps_first=True)),
        "decoded in TF32, codes rounded": (codes, _decoded(codes, parameters, _TF32, steps_first=False)),
        "decoded in bfloat16 on demand of torch": (codes, _decoded(codes, parameters, _BFLOAT16, steps_first=True)),
        "decoded in bfloat16, precision='bfloat16'": (codes, in_bfloat16.decode(codes)),
        "coded and decoded in bfloat16": (own, in_bfloat16.decode(own)),
        "coded in bfloat16, decoded in float32": (own, decoder.decode(own)),
        "coded in TF32, decoded in float32": (in_tf32, decoder.decode(in_tf32)),
    }
    return [
        {
            "max_kl": target,
            "products": name,
            "kl_from_teacher": _largest_mean(logits, decoded),
            "kl_from_float32": _largest_mean(decoder.decode(kept), decoded),
            "worst_row_from_float32": float(measure(decoder.decode(kept), decoded, TEMPERATURES).max()),
            "largest_code": int(_whole(kept).abs().max()),
            "entropy_bytes": _entropy_bytes(kept),
        }
        for name, (kept, decoded) in cases.items()
    ]


class _CodesInTf32(SpectralCodec):
    """Computes coordinates, to be quantised, from factors rounded to TF32."""

    def _coordinates(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        rows = (logits - logits.mean(dim=1, keepdim=True) - parameters["mean"]) * parameters["weights"]
        return torch.matmul(_rounded(rows, _TF32), parameters["basis"].T).double() @ parameters["projection"]


def _decoded(
    codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor], bits: int, *, steps_first: bool
) -> Float32[Tensor, "row class"]:
    steps = parameters["steps"][codes[:, -1:].to(torch.int64)]
    basis = _rounded(parameters["basis"].float(), bits)
    whole = _whole(codes).float()
    if steps_first:
        return _rounded(whole * steps, bits) @ basis + parameters["mean"]
    return (_rounded(whole, bits) @ basis) * steps + parameters["mean"]


def _rounded(values: Float32[Tensor, ...], bits: int) -> Float32[Tensor, ...]:
    """Round float32 to so many significant bits, to the nearest, ties to even."""
    dropped = 24 - bits
    raw = values.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    return ((raw + half + (raw >> dropped & 1)) >> dropped << dropped).view(torch.float32)


def _whole(codes: Shaped[Tensor, "row column"]) -> Tensor:
    zigzag = codes[:, :-1].to(torch.int32)
    return (zigzag >> 1) ^ -(zigzag & 1)


def _largest_mean(true: Tensor, decoded: Tensor) -> float:
    return float(measure(true, decoded, TEMPERATURES).mean(dim=0).max())


def _entropy_bytes(codes: Shaped[Tensor, "row column"]) -> float:
    """Add up the columns' entropies, in bytes a row."""
    total = 0.0
    for column in codes.to(torch.int64).unbind(dim=1):
        shares = column.unique(return_counts=True)[1] / len(column)
        total -= float((shares * shares.log2()).sum()) / 8
    return total
