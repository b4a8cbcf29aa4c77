"""Repairing: drop exactly what is bad of a cache, write anew what follows from the rest, and build what is missing.

`planning` decides from the findings of `kdcache.verify` what is to be done; `sources` says where a damaged document can
be taken from; `mending` does it, in an order that leaves no cache that reads wrong, wherever it stops.
"""

from __future__ import annotations

__all__ = ["Action", "RepairReport", "repair_cache"]

from kdcache.repair.actions import Action, RepairReport
from kdcache.repair.repairing import repair_cache
