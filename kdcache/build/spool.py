"""Room for a pilot's logits: memory, or a mapped temporary file where they are many."""

from __future__ import annotations

__all__ = ["SPOOL_BYTES", "PilotLogits"]

import math
import os
import shutil
import tempfile
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.codecs.head_logits import Head, HeadLogits, Logits
from kdcache.errors import StoreError, TeacherError

SPOOL_BYTES = 2**31
"""Bytes of a pilot's logits that are kept in memory; more of them go to a temporary file."""


class PilotLogits:
    """Collects a teacher's logits, or hidden states, batch after batch, into one array that is held once.

    Up to `SPOOL_BYTES` the array lies in memory, on the batches' device. Above it lies in a temporary file in Python's
    folder for such (TMPDIR), mapped into memory, so that the system can write its pages out. The file has no name in
    the folder, or loses it as soon as it is made: its room is free again once the array is gone, however the process
    ends.

    Parameters
    ----------
    teacher : str
        Its name, for messages.
    num_rows : int
        Rows that will come.
    """

    def __init__(self, teacher: str, num_rows: int) -> None:
        self._teacher = teacher
        self._room: Tensor | None = None
        self._num_rows = num_rows
        self._count = 0

    def add(self, batch: Float[Tensor, "row class"]) -> None:
        """Add the next rows.

        Raises
        ------
        StoreError
            The logits pass `SPOOL_BYTES`, and the folder for temporary files has not the room.
        TeacherError
            The batch has another type than those before.
        """
        if self._room is None:
            self._room = self._made(batch)
        if batch.dtype != self._room.dtype:
            raise TeacherError(
                f"teacher {self._teacher!r} gives logits of type {batch.dtype} after some of type {self._room.dtype}; "
                "let it give one type. Nothing was written"
            )
        self._room[self._count : self._count + len(batch)] = batch
        self._count += len(batch)

    def rows(self) -> Float[Tensor, "row class"]:
        """Give all rows that were added."""
        if self._room is None:
            return torch.empty(0, 0)
        return self._room[: self._count]

    def logits(self, head: Head | None) -> Logits:
        """Give all rows: as they are, or as hidden states with their head, which moves to where they lie.

        A head may come from an accelerator, and the rows lie in a file: what is fitted to them works on one device.
        """
        rows = self.rows()
        return rows if head is None else HeadLogits(rows, head.to(rows.device))

    def _made(self, batch: Tensor) -> Tensor:
        shape = (self._num_rows, batch.shape[1])
        num_bytes = math.prod(shape) * batch.itemsize
        if num_bytes <= SPOOL_BYTES:
            return torch.empty(shape, dtype=batch.dtype, device=batch.device)
        self._check_room(num_bytes)
        with tempfile.TemporaryFile(prefix="kdcache-pilot-") as file:
            self._reserve(file, num_bytes)
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(num_bytes,))
        return torch.from_numpy(mapped).view(batch.dtype).view(shape)

    def _check_room(self, num_bytes: int) -> None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < num_bytes:
            raise self._too_small(num_bytes, f"has {free:,} free")

    def _reserve(self, file: IO[bytes], num_bytes: int) -> None:
        """Take the room now: a mapped file that meets a full disk later ends the process."""
        if not hasattr(os, "posix_fallocate"):
            file.truncate(num_bytes)
            return
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise self._too_small(num_bytes, f"gave none ({error.strerror})") from error

    def _too_small(self, num_bytes: int, found: str) -> StoreError:
        return StoreError(
            f"the pilot of teacher {self._teacher!r} has {self._num_rows:,} rows that take {num_bytes:,} bytes, above "
            f"the {SPOOL_BYTES:,} that are kept in memory; they go to a temporary file, and the folder "
            f"{tempfile.gettempdir()} {found}. Nothing was written. Set TMPDIR to a folder with room, or use fewer "
            "num_pilot_rows (at least four times as many as the teacher's last layer is wide)"
        )
