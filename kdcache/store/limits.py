"""Limits on what is taken from a cache that nobody vouches for."""

from __future__ import annotations

__all__ = ["MAX_CHUNK_BYTES", "MAX_JSON_BYTES", "TooLargeError"]

MAX_JSON_BYTES = 64 * 2**20
"""The largest JSON file that is read: a thousand times the largest of a real cache, and little memory."""

MAX_CHUNK_BYTES = 2**28
"""The largest chunk that is written or read, decoded: a thousand times what a plan aims at, and twice the largest shard
that one makes by itself."""


class TooLargeError(Exception):
    """An object has more bytes than are wanted of it; none was read.

    Parameters
    ----------
    num_bytes : int
        Its size.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes
