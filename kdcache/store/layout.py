"""Where everything stands in a cache: the keys of format v1, relative to the cache's address."""

from __future__ import annotations

__all__ = [
    "CODES",
    "COMPLETE",
    "EXAMPLES",
    "GROUPS",
    "INDEX",
    "INDEX_ENTRIES",
    "INDEX_FENCES",
    "METADATA",
    "PLANS",
    "RECORDS",
    "ROOT",
    "TEACHERS",
    "chunk_key",
    "metadata_key",
    "plan_key",
    "record_key",
    "records_folder",
    "shard_key",
    "shards_folder",
    "teacher_group",
]

METADATA = "zarr.json"
"""Name of the metadata document of every Zarr group and array."""
ROOT = METADATA
"""The root group; its attribute `kdcache` is the cache document."""
PLANS = "plans"
EXAMPLES = "examples.parquet"
COMPLETE = "complete.json"
RECORDS = "commits"
"""Folder of all teachers' records."""
TEACHERS = "teachers"
CODES = "codes"
"""Name of a teacher's array of stored codes."""
INDEX = "index"
INDEX_ENTRIES = f"{INDEX}/entries"
INDEX_FENCES = f"{INDEX}/fences"
GROUPS = (TEACHERS, INDEX)
"""Groups that hold nothing but other nodes."""


def metadata_key(node: str) -> str:
    """Give the key of a group's or array's metadata; the root is the empty string."""
    return f"{node}/{METADATA}" if node else METADATA


def chunk_key(array: str, position: tuple[int, ...]) -> str:
    """Give the key of one stored object of an array, by Zarr v3's default chunk key encoding."""
    return "/".join([array, "c", *map(str, position)])


def plan_key(index: int) -> str:
    """Give the key of the plan that was written as number `index`."""
    return f"{PLANS}/{index}.json"


def teacher_group(name: str) -> str:
    """Give the group of one teacher; its attribute `kdcache` is the teacher document."""
    return f"{TEACHERS}/{name}"


def shard_key(name: str, shard_index: int) -> str:
    """Give the key of one shard of a teacher's codes."""
    return chunk_key(f"{teacher_group(name)}/{CODES}", (shard_index, 0))


def shards_folder(name: str) -> str:
    """Give the folder of all shards of a teacher's codes."""
    return f"{teacher_group(name)}/{CODES}/c"


def records_folder(name: str) -> str:
    """Give the folder of one teacher's records."""
    return f"{RECORDS}/{name}"


def record_key(name: str, shard_index: int) -> str:
    """Give the key of the record that says a shard is published."""
    return f"{records_folder(name)}/{shard_index}.json"
