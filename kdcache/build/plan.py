"""Planning: which rows, shards and tasks a build has. Pure: nothing is written, no teacher is run."""

from __future__ import annotations

__all__ = ["Layout", "choose_layout", "chunk_rows_of", "extend_plan", "make_plan", "refuse_other_plan"]

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdcache.codecs import codec_for
from kdcache.documents import (
    CacheDocument,
    CodecSpec,
    Fingerprint,
    PlanDocument,
    PlannedCodec,
    RateTarget,
    Spectral,
    View,
    differences,
)
from kdcache.errors import PlanMismatchError, ShapeError
from kdcache.store.limits import MAX_CHUNK_BYTES
from kdcache.transfer_set import TransferSet

CHUNK_BYTES = 2**18
"""Raw bytes of an inner chunk, about: small enough for scattered reads, large enough to compress."""
SHARD_BYTES = 2**24
"""Raw bytes of a shard, about: one stored object."""
LARGEST_SHARD_BYTES = 2**27
"""Raw bytes of a shard of a cache that would have more than `MANY_SHARDS` otherwise."""
MANY_SHARDS = 2**16
"""Shards a teacher beyond which shards are made larger: each costs two objects, and time whenever all are counted."""
SHARD_LOGITS_BYTES = 2**29
"""Float32 bytes of a shard's logits at most: what a task holds in memory."""
MAX_CHUNK_ROWS = 4096
MIN_SHARDS = 8
"""A small cache is still cut into this many shards, so that a stopped build loses little."""
NUM_PILOT_ROWS = 2048
MAX_PILOT_ROWS = 4096
"""Of a basis, where its teacher has up to MANY_CLASSES classes."""
MANY_CLASSES = 16384
USUAL_COMPONENTS = 1024
"""Components of a basis that is still to be fitted, for the choice of a layout."""
BASIS_CHUNK_ROWS = 256
"""Codes of a basis are compressed component by component, which wants this many rows."""
BATCH_SIZE = 256

Merge = Literal["geometric"] | None


@dataclass(frozen=True)
class Layout:
    """How rows are cut.

    Parameters
    ----------
    shard_rows, chunk_rows : int
        Rows of a stored object, and rows that are read and checked together.
    """

    shard_rows: int
    chunk_rows: int


def choose_layout(
    codec: PlannedCodec,
    *,
    num_classes: int,
    num_rows: int,
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
) -> Layout:
    """Choose rows a shard and rows a chunk from the size of a row; either can be given.

    Raises
    ------
    ShapeError
        A given number is below 1, or a chunk would take more than 256 MiB.
    CodecError
        There are fewer classes than 1.
    """
    for name, given in (("shard_rows", shard_rows), ("chunk_rows", chunk_rows)):
        if given is not None and given < 1:
            raise ShapeError(f"{name} is {given}; at least 1 is needed. Nothing was written")
    row_bytes = _row_bytes(codec, num_classes)
    few = _power_of_two_from(-(-num_rows // MIN_SHARDS))
    by_size = min(_shard_bytes(row_bytes, num_rows) // row_bytes, SHARD_LOGITS_BYTES // (4 * num_classes), 2**20)
    if shard_rows is None:
        shard_rows = min(_power_of_two_to(by_size), few)
        shard_rows = max(shard_rows, 1) if chunk_rows is None else -(-shard_rows // chunk_rows) * chunk_rows
    if chunk_rows is None:
        few_rows = BASIS_CHUNK_ROWS if _may_have_basis(codec) else 1
        chunk_rows = min(max(_power_of_two_to(CHUNK_BYTES // row_bytes), few_rows), MAX_CHUNK_ROWS, shard_rows)
        while shard_rows % chunk_rows:
            chunk_rows -= 1
    if chunk_rows * row_bytes > MAX_CHUNK_BYTES:
        raise ShapeError(
            f"{chunk_rows} rows of about {row_bytes} bytes would be read at a time, and a chunk may take "
            f"{MAX_CHUNK_BYTES}; nothing was written. Choose fewer chunk_rows"
        )
    return Layout(shard_rows, chunk_rows)


def chunk_rows_of(plan: PlanDocument, codec: CodecSpec) -> int:
    """Give the rows of a chunk of one teacher.

    They are the cache's, but for a rate target for which none were asked for: the plan is made before the codec is
    chosen and reckons with a basis, and chunks of as many rows of all classes would be tens of megabytes each.

    Parameters
    ----------
    plan : PlanDocument
    codec : codec spec
        That of the teacher, fitted.
    """
    cache = plan.cache
    if plan.keeps_chunk_rows or not isinstance(plan.codec, RateTarget):
        return cache.chunk_rows
    return choose_layout(
        codec, num_classes=cache.num_classes, num_rows=cache.num_rows, shard_rows=cache.shard_rows
    ).chunk_rows


def make_plan(
    transfer_set: TransferSet,
    fingerprints: Sequence[Fingerprint],
    *,
    codec: PlannedCodec,
    num_classes: int,
    merge: Merge = None,
    weights: tuple[float, ...] | None = None,
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
    batch_size: int | None = None,
    num_pilot_rows: int | None = None,
    keeps_chunk_rows: bool | None = None,
) -> PlanDocument:
    """Make the plan of a new cache.

    `keeps_chunk_rows` says whether the chunk rows were asked for; they were where they are given, if it is absent.

    Raises
    ------
    DocumentError
        The options contradict each other; all problems are listed.
    TransferSetError
        The transfer set's ids, labels or inputs are malformed.
    """
    if keeps_chunk_rows is None:
        keeps_chunk_rows = chunk_rows is not None
    num_rows = int(transfer_set.num_rows.sum(dtype=np.int64))
    layout = choose_layout(
        codec, num_classes=num_classes, num_rows=num_rows, shard_rows=shard_rows, chunk_rows=chunk_rows
    )
    return PlanDocument.make(
        cache=_cache_document(transfer_set, layout, num_classes=num_classes, num_rows=num_rows, merge=merge),
        teachers=tuple(fingerprints),
        weights=weights,
        codec=codec,
        batch_size=BATCH_SIZE if batch_size is None else batch_size,
        num_pilot_rows=min(_pilot_rows(codec, num_classes) if num_pilot_rows is None else num_pilot_rows, num_rows),
        keeps_chunk_rows=True if isinstance(codec, RateTarget) and keeps_chunk_rows else None,
    )


def _cache_document(
    transfer_set: TransferSet, layout: Layout, *, num_classes: int, num_rows: int, merge: Merge
) -> CacheDocument:
    views = transfer_set.views
    return CacheDocument.make(
        num_classes=num_classes,
        num_examples=len(transfer_set),
        num_rows=num_rows,
        num_views=transfer_set.num_views,
        shard_rows=layout.shard_rows,
        chunk_rows=layout.chunk_rows,
        example_id_type="int64" if transfer_set.example_ids.dtype == np.int64 else "string",
        transfer_set_digest=transfer_set.digest(),
        has_labels=transfer_set.labels is not None,
        has_input_digests=transfer_set.digests_inputs,
        view=None if views is None else View.make(name=views.name, seed=views.seed),
        merge=merge,
    )


def extend_plan(standing: PlanDocument, proposed: PlanDocument) -> PlanDocument:
    """Make the plan that adds the proposed plan's new teachers to a standing one; the standing one if none is new.

    Raises
    ------
    PlanMismatchError
        Anything but appended teachers differs, or the cache is merged.
    """
    if standing.cache.merge is not None:
        raise PlanMismatchError(
            "a merged cache keeps only the mean of its members, so a teacher cannot be added to it; nothing was "
            "changed. Build all members into a new cache"
        )
    known = {teacher.name: teacher for teacher in standing.teachers}
    if any(known.get(teacher.name, teacher) != teacher for teacher in proposed.teachers):
        refuse_other_plan(standing, proposed)
    refuse_other_plan(standing, proposed.model_copy(update={"teachers": standing.teachers}))
    new = tuple(teacher for teacher in proposed.teachers if teacher.name not in known)
    if not new:
        return standing
    return PlanDocument.make(
        **{**dict(standing), "teachers": (*standing.teachers, *new), "previous": standing.digest()}
    )


def refuse_other_plan(standing: PlanDocument, proposed: PlanDocument) -> None:
    """Raise where a proposed plan is not the standing one.

    Raises
    ------
    PlanMismatchError
        Prints every field that differs, from both sides, and the ways out.
    """
    found = list(differences(_comparable(proposed), _comparable(standing)))
    if not found:
        return
    lines = "\n".join(f"  {path}: now {_short(mine)}, in the cache {_short(other)}" for path, mine, other in found)
    raise PlanMismatchError(
        f"the cache was planned otherwise; {len(found)} difference(s):\n{lines}\n"
        f"{_advice([path for path, _, _ in found])} Nothing was changed."
    )


def _comparable(plan: PlanDocument) -> dict[str, Any]:
    """Name the teachers, so that one that changed is held against itself and not against its neighbour."""
    mapping = plan.to_mapping()
    teachers = {teacher["name"]: teacher for teacher in mapping["teachers"]}
    return {**mapping, "teachers": teachers, "ensemble": ", ".join(teachers), "previous": None}


def _advice(paths: list[str]) -> str:
    if any(path.startswith("cache.transfer_set_digest") or path == "cache.num_examples" for path in paths):
        return (
            "The transfer set is another one: other ids, labels, row counts or inputs. Give the one the cache was "
            "planned with, or build at a new address."
        )
    if any(path.endswith("settings_sha256") for path in paths):
        return (
            "A teacher is made otherwise under the same name: other layers, options or factory arguments. Make it as "
            "before, or give it a new name and add it (add_teachers=True, --add-teachers), or build at a new address."
        )
    if any(path.endswith("weights_sha256") for path in paths):
        return (
            "A teacher's weights changed under the same name. Give the old checkpoint, or give the new one a new name "
            "and add it (add_teachers=True, --add-teachers), or build at a new address."
        )
    if any(path.startswith(("teachers", "ensemble")) for path in paths):
        return (
            "Give the teachers the cache was planned with, in its order. To add new ones say so (add_teachers=True, "
            "--add-teachers), or build at a new address."
        )
    return (
        "Leave these options out or give them as before to go on with this cache, read it as it is with open_cache, or "
        "build at a new address."
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:297] + "..."


def _row_bytes(codec: PlannedCodec, num_classes: int) -> int:
    """Count the raw bytes of a row; of a basis that is still to be fitted, about."""
    if isinstance(codec, RateTarget) or (isinstance(codec, Spectral) and codec.rank is None):
        return 2 * (min(num_classes, USUAL_COMPONENTS) + 1)
    made = codec_for(codec, num_classes)
    return made.num_columns * np.dtype(made.storage_dtype).itemsize


def _shard_bytes(row_bytes: int, num_rows: int) -> int:
    """Choose the raw bytes of a shard, about: more where there would be very many."""
    num_bytes = SHARD_BYTES
    while num_bytes < LARGEST_SHARD_BYTES and num_rows * row_bytes > MANY_SHARDS * num_bytes:
        num_bytes *= 2
    return num_bytes


def _may_have_basis(codec: PlannedCodec) -> bool:
    return isinstance(codec, RateTarget | Spectral)


def _pilot_rows(codec: PlannedCodec, num_classes: int) -> int:
    """Choose the pilot's rows: a basis wants four times as many as it has components, where memory allows."""
    if not _may_have_basis(codec):
        return NUM_PILOT_ROWS
    wanted = max(NUM_PILOT_ROWS, 4 * num_classes)
    return min(wanted, MAX_PILOT_ROWS) if num_classes <= MANY_CLASSES else NUM_PILOT_ROWS * 9 // 8


def _power_of_two_to(value: int) -> int:
    return 1 << max(0, value.bit_length() - 1) if value > 0 else 1


def _power_of_two_from(value: int) -> int:
    return 1 << max(0, (value - 1).bit_length())
