"""The store: the only part that knows Zarr, Parquet and files.

`CacheStore` reads and writes a cache's parts; `Objects` is where their bytes are kept.
"""

from __future__ import annotations

__all__ = [
    "CacheSizes",
    "CacheStore",
    "CodesReader",
    "ExampleTable",
    "KeptPages",
    "LocalCopy",
    "LocalObjects",
    "Objects",
    "PublishedShard",
    "ResidentCodes",
    "open_objects",
]

from kdcache.store.codes_reader import CodesReader
from kdcache.store.examples import ExampleTable
from kdcache.store.kept_pages import KeptPages
from kdcache.store.local_copy import LocalCopy
from kdcache.store.local_objects import LocalObjects
from kdcache.store.objects import Objects, open_objects
from kdcache.store.resident import ResidentCodes
from kdcache.store.sizes import CacheSizes
from kdcache.store.store import CacheStore, PublishedShard
