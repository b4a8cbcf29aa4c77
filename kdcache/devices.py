"""Devices: where teachers and students run."""

from __future__ import annotations

__all__ = ["choose_device", "like", "move"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import OptionError


def choose_device(name: str) -> torch.device:
    """Read a device's name; ``auto`` takes cuda where there is one.

    Raises
    ------
    OptionError
        There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is no device of torch; give 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {name!r} was asked for, but torch finds no CUDA device; give 'auto' or 'cpu'")
    if device == torch.device("cuda"):  # without a number
        return torch.device("cuda", torch.cuda.current_device())
    return device


def move(inputs: Any, device: torch.device | str) -> Any:
    """Move a batch of inputs: a tensor, or mappings and sequences of tensors."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {key: move(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return like(inputs, [move(value, device) for value in inputs])
    return inputs


def like(sequence: tuple[Any, ...] | list[Any], values: list[Any]) -> Any:
    """Give a sequence of the kind of another, a named tuple too, of these values."""
    return type(sequence)(*values) if hasattr(sequence, "_fields") else type(sequence)(values)
