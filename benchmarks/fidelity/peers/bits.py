"""Integers of any width packed side by side into bytes, the first bit of each the highest."""

from __future__ import annotations

__all__ = ["pack_bits", "unpack_bits"]

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor


def pack_bits(values: Int[Tensor, "row column"], num_bits: int) -> UInt8[Tensor, "row byte"]:
    """Pack non-negative integers of `num_bits` bits each; a row ends on a whole byte.

    Parameters
    ----------
    values : Tensor [row, column]
        Integers below 2^num_bits.
    num_bits : int
        1 to 32.

    Examples
    --------
    >>> pack_bits(torch.tensor([[1, 2, 3]]), num_bits=4)
    tensor([[18, 48]], dtype=torch.uint8)
    """
    words = np.ascontiguousarray(values.numpy(), dtype=">u4")
    bits = np.unpackbits(words.view(np.uint8).reshape(*words.shape, 4), axis=2)[:, :, 32 - num_bits :]
    return torch.from_numpy(np.packbits(bits.reshape(len(words), -1), axis=1))


def unpack_bits(packed: UInt8[Tensor, "row byte"], num_bits: int, num_columns: int) -> Int[Tensor, "row column"]:
    """Give back the int64 integers that `pack_bits` packed.

    Examples
    --------
    >>> unpack_bits(torch.tensor([[18, 48]], dtype=torch.uint8), num_bits=4, num_columns=3)
    tensor([[1, 2, 3]])
    """
    bits = np.unpackbits(packed.numpy(), axis=1, count=num_bits * num_columns)
    padded = np.zeros((len(bits), num_columns, 32), dtype=np.uint8)
    padded[:, :, 32 - num_bits :] = bits.reshape(len(bits), num_columns, num_bits)
    words = np.packbits(padded, axis=2).view(">u4")[:, :, 0]
    return torch.from_numpy(words.astype(np.int64))
