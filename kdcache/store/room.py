"""Room that each thread keeps for what passes through it: new memory for each chunk would cost as much as reading."""

from __future__ import annotations

__all__ = ["lent", "room"]

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_KEPT_BYTES = 2**26
"""Larger pieces are not kept: a thread would hold them for ever."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.pieces: dict[str, npt.NDArray[np.uint8]] = {}


_kept = _Kept()


def room(name: str, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Give memory that is this thread's until it asks for the same name again; what is in it is of no meaning."""
    piece = _kept.pieces.get(name)
    if piece is None or len(piece) < num_bytes:
        piece = np.empty(num_bytes, np.uint8)
        if num_bytes <= _KEPT_BYTES:
            _kept.pieces[name] = piece
    return piece[:num_bytes]


@contextlib.contextmanager
def lent(name: str, num_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Give memory of this thread that nobody else is given until it is back, who asks for the same name either."""
    piece = _kept.pieces.pop(name, None)
    if piece is None or len(piece) < num_bytes:
        piece = np.empty(num_bytes, np.uint8)
    try:
        yield piece[:num_bytes]
    finally:
        if len(piece) <= _KEPT_BYTES:
            _kept.pieces[name] = piece
