"""What a cache takes on disk, by what it is for."""

from __future__ import annotations

__all__ = ["CacheSizes", "sizes_of"]

from dataclasses import dataclass

from kdcache.store import layout
from kdcache.store.objects import Objects


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that a cache takes.

    Parameters
    ----------
    code_bytes : int
        Of all teachers' shards.
    parameter_bytes : int
        Of all codecs' parameters, stored once a teacher.
    id_bytes : int
        Of the id index and the example table, stored once a cache: ids, labels and input digests.
    document_bytes : int
        Of all else: plans, records, metadata.
    """

    code_bytes: int
    parameter_bytes: int
    id_bytes: int
    document_bytes: int

    @property
    def num_bytes(self) -> int:
        """The whole."""
        return self.code_bytes + self.parameter_bytes + self.id_bytes + self.document_bytes


def sizes_of(objects: Objects) -> CacheSizes:
    """Add up the sizes of a cache's objects; none is read.

    Parameters
    ----------
    objects : Objects
        Of a cache.
    """
    sums = {"code": 0, "parameter": 0, "id": 0, "document": 0}
    for key, size in objects.sizes("").items():
        sums[_purpose(key)] += size
    return CacheSizes(*sums.values())


def _purpose(key: str) -> str:
    first, *rest = key.split("/")
    if first == layout.TEACHERS and len(rest) > 2 and not key.endswith(layout.METADATA):
        return "code" if rest[1] == layout.CODES else "parameter"
    return "id" if key == layout.EXAMPLES or first == layout.INDEX else "document"
