"""Transfer set: the examples whose soft targets are cached, each with a unique example_id.

A *view* is one reproducible augmentation of an example; all its randomness comes from (seed, example_id, view_index).
An *input digest* identifies an example's input before any view, so that training on other inputs is noticed.
"""

from __future__ import annotations

__all__ = ["TransferSet", "Views", "input_digest", "transfer_set_digest", "view_generator"]

from kdcache.transfer_set.core import TransferSet
from kdcache.transfer_set.digests import input_digest, transfer_set_digest
from kdcache.transfer_set.views import Views, view_generator
