"""Streaming: soft targets and inputs into the training of students.

An *order* is a permutation of the examples, a pure function of (seed, epoch). *Global batches* are cut from it; each
rank takes its part of every one. A *loader* gives them, joined by example_id, never by position. *Joined batches* are
those of any other loader.
"""

from __future__ import annotations

__all__ = ["JoinedBatches", "SoftTargetLoader", "epoch_order"]

from kdcache.documents import CacheDocument, CompleteDocument, PlanDocument, Record, TeacherDocument
from kdcache.stream.join import JoinedBatches
from kdcache.stream.loader import SoftTargetLoader
from kdcache.stream.order import epoch_order

for _document in (CacheDocument, CompleteDocument, PlanDocument, Record, TeacherDocument):
    _document.model_rebuild()  # made ready by the first reading else, which is within the first batch
