"""Zigzag: 0, -1, 1, -2, 2 as 0, 1, 2, 3, 4, so that small magnitudes have small codes."""

from __future__ import annotations

__all__ = ["scaled", "unzigzag", "zigzag"]

import torch
from jaxtyping import Float32, Int16, Int32
from torch import Tensor

_BLOCK_ROWS = 256
"""Rows undone at a time on a processor, so that what is made on the way stays in its cache."""


def zigzag(values: Int32[Tensor, "row component"]) -> Int32[Tensor, "row component"]:
    """Give the codes of signed numbers."""
    return (values << 1) ^ (values >> 31)


def unzigzag(bits: Int16[Tensor, "row component"]) -> Int16[Tensor, "row component"]:
    """Undo the zigzag on the bits of uint16 codes, in int16: four times faster than in int32."""
    return ((bits >> 1) & 0x7FFF) ^ -(bits & 1)


def scaled(bits: Int16[Tensor, "row component"], steps: Float32[Tensor, "row 1"]) -> Float32[Tensor, "row component"]:
    """Undo the zigzag and multiply each row by its step: on a processor block by block, up to 1.6 times as fast."""
    if bits.device.type != "cpu" or torch.compiler.is_compiling():
        return unzigzag(bits) * steps
    result = torch.empty(bits.shape, dtype=torch.float32, device="cpu")
    values, signs = torch.empty(2, _BLOCK_ROWS, bits.shape[1], dtype=torch.int16, device="cpu")
    for start in range(0, len(bits), _BLOCK_ROWS):
        block = bits[start : start + _BLOCK_ROWS]
        value, sign = values[: len(block)], signs[: len(block)]
        torch.bitwise_and(block, 1, out=sign)
        torch.bitwise_right_shift(block, 1, out=value)
        value.bitwise_and_(0x7FFF).bitwise_xor_(sign.neg_())
        torch.mul(value, steps[start : start + _BLOCK_ROWS], out=result[start : start + _BLOCK_ROWS])
    return result
