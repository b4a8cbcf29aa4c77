"""Verifying: hold everything that stands of a cache against what vouches for it. Changes nothing.

A *finding* is damage; a *note* is a file that is no part of the cache. `standing` reads the documents, `documents`
holds them against each other, `planned` holds teachers' documents against the plan, `shards` holds each shard against
its record, `decoding` decodes every row.
"""

from __future__ import annotations

__all__ = ["Finding", "Kind", "Level", "Note", "VerifyReport", "verify_cache"]

from kdcache.verify.checking import verify_cache
from kdcache.verify.findings import Finding, Kind, Level, Note, VerifyReport
