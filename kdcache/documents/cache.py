"""The cache document: what a cache holds and how its rows are laid out."""

from __future__ import annotations

__all__ = ["FORMAT_VERSION", "CacheDocument", "View"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Digest, Document, Name

FORMAT_VERSION = 1
"""The version of the stored format that this release writes."""

Count = Annotated[int, Field(ge=1, le=2**53)]


class View(Document):
    """The augmentation that made the views; all its randomness comes from (seed, example_id, view_index)."""

    title: ClassVar[str] = "view"

    name: Name
    """The user's name for the augmentation and its version."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of all views."""


class CacheDocument(Document):
    """Stored as attribute `kdcache` of the cache's root group; never changes once written."""

    title: ClassVar[str] = "cache"

    format: Literal["kdcache"] = "kdcache"
    format_version: Literal[1] = 1
    num_classes: Count
    """Classes of every teacher."""
    num_examples: Count
    """Examples of the transfer set."""
    num_rows: Count
    """Rows of one view: the sum of the examples' rows."""
    num_views: Count = 1
    """View-major blocks of rows, each padded to whole shards."""
    shard_rows: Count
    """Rows of a stored object."""
    chunk_rows: Count
    """Rows that are read and checked together, of teachers whose documents name no other number."""
    example_id_type: Literal["int64", "string"]
    transfer_set_digest: Digest
    """SHA-256 over ids, rows, labels and input digests, in row order."""
    has_labels: bool
    has_input_digests: bool
    view: View | None = None
    merge: Literal["geometric"] | None = None
    """`geometric`: one stored array, the mean of the members' logits."""

    @model_validator(mode="after")
    def _check(self) -> CacheDocument:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows ({self.shard_rows}) is no multiple of chunk_rows ({self.chunk_rows})")
        if self.num_rows < self.num_examples:
            raise ValueError(f"num_rows ({self.num_rows}) is smaller than num_examples ({self.num_examples})")
        if self.num_views > 1 and self.view is None:
            raise ValueError("num_views is above 1 but no view is named")
        return self

    @property
    def shards_per_view(self) -> int:
        """Shards that one view's block of rows takes."""
        return -(-self.num_rows // self.shard_rows)

    @property
    def padded_rows(self) -> int:
        """Rows from one view's block to the next, padding included."""
        return self.shards_per_view * self.shard_rows

    @property
    def num_shards(self) -> int:
        """Shards of one teacher."""
        return self.shards_per_view * self.num_views

    def rows_in_shard(self, shard_index: int) -> int:
        """Count the rows of a shard that are not padding."""
        block_row = (shard_index % self.shards_per_view) * self.shard_rows
        return min(self.shard_rows, self.num_rows - block_row)
