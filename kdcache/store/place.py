"""Place: where a stored thing stands and what mends it, for the message of every error about it."""

from __future__ import annotations

__all__ = ["Place"]

from dataclasses import dataclass

from kdcache.errors import CorruptCacheError


@dataclass(frozen=True, slots=True)
class Place:
    """An object of a cache and the remedy for damage to it.

    Parameters
    ----------
    address : str
        The cache's address.
    key : str
        The object's key.
    remedy : str
        What to do when the object is damaged: full sentences.
    """

    address: str
    key: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.address}/{self.key}"

    def corrupt(self, reason: str) -> CorruptCacheError:
        """Make the error that says that this object is missing, torn or altered."""
        return CorruptCacheError(f"{self}: {reason}. Nothing was changed. {self.remedy}")
