"""What matrix products round: by the type of their factors, and by what torch may do to those of float32."""

from __future__ import annotations

__all__ = ["TF32_INTEGERS", "UNIT_ROUNDINGS", "factor_rounding", "keeps_float32", "quick_dtype", "sum_rounding"]

from collections.abc import Mapping
from typing import Any, Final

import torch

UNIT_ROUNDINGS: Final[Mapping[torch.dtype, float]] = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Largest relative error of rounding to a type: 2^-p for p significant bits, the first of which is not stored."""

TF32_INTEGERS: Final = 2**11
"""Integers up to this are kept by TF32, which has the significant bits of float16."""

_TF32: Final = 2.0**-11


def keeps_float32(device: torch.device) -> bool:
    """Tell whether products of float32 keep the digits of their factors on a device, as torch is set now."""
    return _float32_rounding(device) == UNIT_ROUNDINGS[torch.float32]


def factor_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Give what numbers may be rounded by, relative to themselves, when they become factors of a product of a type."""
    return _float32_rounding(device) if dtype == torch.float32 else UNIT_ROUNDINGS[dtype]


def sum_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Give what a matrix product's entries of a type may be rounded by when they are added up, relative to the result.

    Twice as much where an accelerator may add up parts of a sum in 16 bits.
    """
    flag = {
        torch.float16: "allow_fp16_reduced_precision_reduction",
        torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    }
    in_parts = device.type == "cuda" and dtype in flag and bool(getattr(torch.backends.cuda.matmul, flag[dtype], True))
    return UNIT_ROUNDINGS[dtype] * (2 if in_parts else 1)


def quick_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Give the type in which products are quickest that lose nothing of factors of a type: it, or float32.

    A processor without instructions for 16 bits imitates them, eighty times more slowly than it multiplies float32.
    """
    if device.type != "cpu" or dtype not in _INSTRUCTIONS:
        return dtype
    has_any = any(getattr(torch.cpu, name, lambda: False)() for name in _INSTRUCTIONS[dtype])
    return dtype if has_any else torch.float32


_INSTRUCTIONS: Final[Mapping[torch.dtype, tuple[str, ...]]] = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def _float32_rounding(device: torch.device) -> float:
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # torch below 2.9 has one setting for all; torch.get_float32_matmul_precision raises where the newer ones disagree
    matmul = getattr(backend, "matmul", None)
    setting = getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    if setting in {"bf16", "medium"}:
        return UNIT_ROUNDINGS[torch.bfloat16]
    return _TF32 if setting in {"tf32", "high"} else UNIT_ROUNDINGS[torch.float32]
