"""A cache opened with zarr-python, wherever it stands."""

from __future__ import annotations

__all__ = ["open_zarr_group"]

import zarr
from zarr.storage import ObjectStore

from kdcache.store.bucket_objects import BucketObjects
from kdcache.store.objects import Objects, open_objects


def open_zarr_group(objects: Objects) -> zarr.Group:
    """Open a cache's root group read-only, through its consolidated metadata.

    Parameters
    ----------
    objects : Objects
        Where the cache is kept; what is kept nearer is not asked.
    """
    if not isinstance(objects, BucketObjects):  # pages of objects that lie elsewhere, perhaps
        objects = open_objects(objects.address)
    if isinstance(objects, BucketObjects):
        store = ObjectStore(objects.client.reading, read_only=True)
        return zarr.open_group(store, mode="r", use_consolidated=True)
    return zarr.open_group(objects.address, mode="r", use_consolidated=True)
