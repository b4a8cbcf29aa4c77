"""What a cache of very many shards costs to build: records, scheduling, throughput, and what follows for 10^10 rows."""

from __future__ import annotations

__all__ = ["run"]

from benchmarks.scale.records import run
