"""Writers: which machine a writing process runs on, and whether one of this machine lives."""

from __future__ import annotations

__all__ = ["is_alive", "this_machine"]

import contextlib
import functools
import hashlib
import os
import pathlib
import socket


@functools.cache
def this_machine() -> str:
    """Name the space in which process ids are unique: a machine since its last start, or a container on one."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(pathlib.Path("/proc/self/ns/pid").readlink()))
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine lives."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
