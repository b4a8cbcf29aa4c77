"""Checksums: the CRC-32C that stands behind whatever is stored with one of its own, little-endian."""

from __future__ import annotations

__all__ = ["CHECKSUM_BYTES", "checksum", "is_sound", "with_checksum"]

import struct
from typing import Any

import google_crc32c

CHECKSUM_BYTES = 4
_SOUND = 0x48674BC7
"""CRC-32C of any bytes with their own CRC-32C behind them: what is checked need not be cut off, which would copy it."""


def checksum(data: bytes) -> bytes:
    """Give the CRC-32C of some bytes, as four bytes."""
    return struct.pack("<I", google_crc32c.value(data))


def with_checksum(body: bytes) -> bytes:
    """Give some bytes with their checksum behind them."""
    return body + checksum(body)


def is_sound(data: Any) -> bool:
    """Tell whether bytes, or an array of uint8, end with the checksum of all that stands before."""
    return bool(google_crc32c.value(data) == _SOUND)
