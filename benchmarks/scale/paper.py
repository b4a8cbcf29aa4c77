"""On paper: 10^10 rows of 1,000 classes at 200 bytes, a thousand workers, from the figures measured here."""

from __future__ import annotations

__all__ = ["on_paper"]

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.build.plan import choose_layout
from kdcache.documents import Codes

NUM_ROWS = 10**10
NUM_CLASSES = 1_000
BYTES_PER_ROW = 200
NUM_WORKERS = 1_000
EARLIER_SHARD_ROWS = 16_384
"""What was chosen before shards grew with the cache."""

GET_SECONDS = 0.03
"""Until an object store answers a request for a small object; taken, not measured."""
GETS_PER_SECOND = 5_500
PUTS_PER_SECOND = 3_500
"""What Amazon states for S3, a prefix."""
KEYS_PER_LIST = 1_000
READING_THREADS = 32


def on_paper(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reckon with the shards of earlier releases, and with those that are chosen now."""
    largest = max(records, key=lambda row: row["records"])
    chosen = choose_layout(Codes(), num_classes=NUM_CLASSES, num_rows=NUM_ROWS).shard_rows
    return [_reckon(shard_rows, largest) for shard_rows in (EARLIER_SHARD_ROWS, chosen)]


def _reckon(shard_rows: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    num_shards = -(-NUM_ROWS // shard_rows)
    on_disk = num_shards / measured["records"]
    listed = num_shards / KEYS_PER_LIST * GET_SECONDS
    requests = 2 * num_shards  # a record's size, and its bytes
    one_by_one = listed + requests * GET_SECONDS
    at_once = listed + requests * max(GET_SECONDS / READING_THREADS, 1 / GETS_PER_SECOND)
    return {
        "shard_rows": shard_rows,
        "shards": num_shards,
        "objects": 2 * num_shards,
        "shard_megabytes": shard_rows * BYTES_PER_ROW / 1e6,
        "record_gigabytes": num_shards * measured["record_bytes"] / 1e9,
        "list_on_disk_seconds": on_disk * measured["list_seconds"],
        "finalise_on_disk_seconds": on_disk * measured["finalise_seconds"],
        "list_on_s3_seconds": listed,
        "records_from_s3_one_by_one_hours": one_by_one / 3600,
        "records_from_s3_at_once_seconds": max(at_once, on_disk * measured["finalise_seconds"]),
        "publish_on_s3_seconds": 2 * num_shards / PUTS_PER_SECOND,
        "logits_of_a_shard_megabytes": 4 * NUM_CLASSES * shard_rows / 1e6,
        "tasks_a_worker": num_shards / NUM_WORKERS,
    }
