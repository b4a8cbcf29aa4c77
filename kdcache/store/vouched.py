"""Vouched records: which of a teacher's records may be believed that are kept nearer than where the cache lies.

`complete.json` names one digest over the digests of all records of a teacher, against which a single record cannot be
held. So the digests of the records that are read are noted, and once all of them together are what `complete.json`
vouches for, their list is kept: each record is held against the list then, and the list against `complete.json`.
"""

from __future__ import annotations

__all__ = ["VouchedRecords"]

import hashlib
from dataclasses import dataclass

from kdcache.documents.completion import digest_of_digests

_LINE_BYTES = 65


@dataclass(frozen=True)
class VouchedRecords:
    """What `complete.json` vouches for in a folder of records.

    Parameters
    ----------
    num_records : int
        Records of the folder, named by their numbers from 0 on.
    records_digest : str
        SHA-256 over the lines of their digests.
    """

    num_records: int
    records_digest: str

    def listed(self, digests: dict[int, str]) -> bytes | None:
        """Give the list of all digests, if they are all there and together what is vouched for."""
        if len(digests) != self.num_records or min(digests) != 0 or max(digests) != self.num_records - 1:
            return None
        in_order = [digests[index] for index in range(self.num_records)]
        return "\n".join(in_order).encode() if digest_of_digests(in_order) == self.records_digest else None

    def is_list(self, data: bytes) -> bool:
        """Tell whether bytes that were kept are the list that is vouched for."""
        return len(data) == self.num_records * _LINE_BYTES - 1 and (
            hashlib.sha256(data).hexdigest() == self.records_digest
        )

    @staticmethod
    def is_vouched(data: bytes, index: int, listed: bytes) -> bool:
        """Tell whether a record's bytes are those of which the list holds the digest."""
        return hashlib.sha256(data).hexdigest().encode() == listed[index * _LINE_BYTES :][: _LINE_BYTES - 1]
