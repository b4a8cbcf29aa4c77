"""Moving batches to the device they are trained on, ahead of their use."""

from __future__ import annotations

__all__ = ["DeviceTransfer"]

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kdcache.devices import choose_device, like, move
from kdcache.soft_targets import SoftTargets


class DeviceTransfer:
    """Copies batches to a device; to an accelerator from page-locked memory, on a stream beside that of the training.

    Parameters
    ----------
    device : str or torch.device, optional
        Where batches go; None leaves them where they are made.

    Raises
    ------
    OptionError
        There is no such device.
    """

    def __init__(self, device: str | torch.device | None) -> None:
        self.device = None if device is None else choose_device(str(device))
        self._stream = None if self.device is None or self.device.type != "cuda" else torch.cuda.Stream(self.device)

    def begin(self) -> None:
        """Let copies come behind what the training's stream has been asked for so far, in the training's thread."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Do what makes a batch on the stream of the copies, in any thread."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], torch.cuda.Event | None]:
        """Start the copy, in any thread."""
        if self.device is None:
            return batch, None
        if self._stream is None:
            return tuple(_moved(part, self.device) for part in batch), None
        with torch.cuda.stream(self._stream):
            moved = tuple(_moved(_pinned(part), self.device) for part in batch)
            return moved, self._stream.record_event()

    def received(self, batch: tuple[Any, ...], copied: torch.cuda.Event | None) -> tuple[Any, ...]:
        """Let the training's stream wait for the copy, in the training's thread."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in _tensors(batch):
                tensor.record_stream(stream)
        return batch


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, SoftTargets):
        return part.to(device, non_blocking=device.type == "cuda")  # others read on from memory that is used again
    return move(part, device)


def _pinned(part: Any) -> Any:
    if isinstance(part, SoftTargets):
        return part if part.device.type == "cuda" else part.pin_memory()
    if isinstance(part, Tensor):
        return part if part.is_cuda else part.pin_memory()
    if isinstance(part, Mapping):
        return {key: _pinned(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return like(part, [_pinned(value) for value in part])
    return part


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, SoftTargets):
        yield from part.codes
        if part.available is not None:
            yield part.available
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _tensors(value)
    elif isinstance(part, tuple | list):
        for value in part:
            yield from _tensors(value)
