"""What a process and its children take: seconds of processor, anonymous memory, bytes on disk, pages in memory."""

from __future__ import annotations

__all__ = ["MemoryPeak", "bytes_on_disk", "children_cpu_seconds", "cpu_seconds", "drop_pages", "own_memory_bytes"]

import os
import resource
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_COUNTED: Final = ("Pss_Anon:", "Pss_Shmem:")
_PERIOD_SECONDS: Final = 0.02


def cpu_seconds() -> float:
    """Give the seconds of processor of this process, of all its threads."""
    return _seconds_of(resource.RUSAGE_SELF)


def children_cpu_seconds() -> float:
    """Give the seconds of processor of this process's children that have ended."""
    return _seconds_of(resource.RUSAGE_CHILDREN)


def _seconds_of(kind: int) -> float:
    usage = resource.getrusage(kind)
    return usage.ru_utime + usage.ru_stime


def own_memory_bytes() -> int:
    """Give anonymous and shared memory of this process and its children: what lies in files is not counted.

    Pages that several processes share are counted once.
    """
    return sum(_memory_of(pid) for pid in _family(os.getpid()))


class MemoryPeak:
    """Watches memory from a thread while a block runs; `num_bytes` is the most that was seen."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_SECONDS):
            self._look()

    def _look(self) -> None:
        self.num_bytes = max(self.num_bytes, own_memory_bytes())


def bytes_on_disk(folder: Path) -> int:
    """Add up the sizes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def drop_pages(folder: Path) -> None:
    """Ask the system to forget the pages of every file of a folder: posix_fadvise with DONTNEED, after fsync."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def _family(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # ended since
                continue
    family = [pid]
    for member in family:
        family.extend(child for child, parent in parents.items() if parent == member)
    return family


def _memory_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # ended since
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(_COUNTED))
