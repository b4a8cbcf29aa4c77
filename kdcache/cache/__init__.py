"""A cache for reading: opened by its documents, read by the ids of its examples."""

from __future__ import annotations

__all__ = ["LOCAL_CACHE_BYTES", "RESIDENT_BYTES", "SoftTargetCache", "open_cache"]

from kdcache.cache.opening import LOCAL_CACHE_BYTES, open_cache
from kdcache.cache.reading import RESIDENT_BYTES, SoftTargetCache
