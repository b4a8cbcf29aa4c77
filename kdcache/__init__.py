"""kdcache: run an ensemble of teachers once, keep its logits, train students at any temperature from the cache.

The public names are loaded when first used, so that ``import kdcache`` is quick and pulls in neither torch, Zarr nor
Dask.
"""

from __future__ import annotations

__all__ = [
    "Codes",
    "DistillationLoss",
    "Lossless",
    "RateTarget",
    "SoftTargetCache",
    "SoftTargetLoader",
    "SoftTargets",
    "Spectral",
    "TeacherWithHead",
    "TopK",
    "TransferSet",
    "Views",
    "__version__",
    "build_cache",
    "distillation_loss",
    "errors",
    "open_cache",
    "plan_cache",
    "repair_cache",
    "verify_cache",
]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache import errors
    from kdcache.build import TeacherWithHead, build_cache, plan_cache
    from kdcache.cache import SoftTargetCache, open_cache
    from kdcache.documents import Codes, Lossless, RateTarget, Spectral, TopK
    from kdcache.losses import DistillationLoss, distillation_loss
    from kdcache.repair import repair_cache
    from kdcache.soft_targets import SoftTargets
    from kdcache.stream import SoftTargetLoader
    from kdcache.transfer_set import TransferSet, Views
    from kdcache.verify import verify_cache

__version__ = "0.1.0"

_HOMES = {
    "Codes": "documents",
    "DistillationLoss": "losses",
    "Lossless": "documents",
    "RateTarget": "documents",
    "SoftTargetCache": "cache",
    "SoftTargetLoader": "stream",
    "SoftTargets": "soft_targets",
    "Spectral": "documents",
    "TeacherWithHead": "build",
    "TopK": "documents",
    "TransferSet": "transfer_set",
    "Views": "transfer_set",
    "build_cache": "build",
    "distillation_loss": "losses",
    "open_cache": "cache",
    "plan_cache": "build",
    "repair_cache": "repair",
    "verify_cache": "verify",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("kdcache.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kdcache.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
