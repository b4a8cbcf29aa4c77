"""Teachers for whole clusters of processes: they note every batch in a folder, and some end their process."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_caches import TinyTeacher
from torch import nn


class Call(NamedTuple):
    pid: int
    first_input: str
    start: float
    end: float


def calls_in(folder: Path) -> list[Call]:
    """The batches that were begun and ended, by any process."""
    found = (path.read_text().split() for path in sorted(folder.glob("*.call")))
    return [Call(int(pid), first, float(start), float(end)) for pid, first, start, end in found]


class Noted(nn.Module):
    """A teacher that notes its batches, slowly enough to be watched."""

    def __init__(self, folder: Path, *, seed: int = 0, seconds: float = 0.0) -> None:
        super().__init__()
        self.linear = TinyTeacher(seed)
        self.folder = str(folder)
        self.seconds = seconds

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        start = time.time()
        self.before(inputs)
        time.sleep(self.seconds)
        note = Path(self.folder, secrets.token_hex(8))
        note.write_text(f"{os.getpid()} {float(inputs[0, 0]):.6f} {start} {time.time()}")
        note.rename(f"{note}.call")
        return self.linear(inputs)

    def before(self, inputs: torch.Tensor) -> None:
        """Do nothing before a batch."""


class Deadly(Noted):
    """Ends its process when it is given one example, as long as the file `deadly` stands in its folder."""

    def __init__(self, folder: Path, marker: float, how: str, **options: float) -> None:
        super().__init__(folder, **options)
        self.marker = marker
        self.how = how

    def before(self, inputs: torch.Tensor) -> None:
        if not Path(self.folder, "deadly").exists() or not bool((inputs[:, 0] == self.marker).any()):
            return
        if self.how == "exit":
            os._exit(1)
        if self.how == "segfault":
            ctypes.string_at(0)
        if self.how == "killed":
            Path(self.folder, f"{os.getpid()}.victim").touch()  # a test plays the kernel that is out of memory
            time.sleep(60)


class Together(Noted):
    """Begins its first batch in a process only when it was begun in two: what overlaps, truly overlaps."""

    def before(self, inputs: torch.Tensor) -> None:  # noqa: ARG002 - any batch
        folder = Path(self.folder)
        (folder / f"{os.getpid()}.begun").touch()
        deadline = time.monotonic() + 30
        while len(list(folder.glob("*.begun"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)


def end_victims(folder: Path) -> list[int]:
    """Kill the processes that wait to be killed, as the kernel does; gives their ids."""
    ended = []
    for path in folder.glob("*.victim"):
        path.unlink()
        os.kill(int(path.stem), signal.SIGKILL)
        ended.append(int(path.stem))
    return ended


def resources_and_pid(dask_worker: Any) -> tuple[dict[str, float], int]:
    """Run on a worker: what it offers, and its process."""
    return dask_worker.state.total_resources, os.getpid()
