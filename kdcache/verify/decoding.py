"""Verifying deeply: every row read as a reader reads it, decoded, and held against records and examples."""

from __future__ import annotations

__all__ = ["TeacherDecoding", "check_examples"]

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kdcache.cache.decoders import open_decoder
from kdcache.codecs import Decoder
from kdcache.codecs.base import row_blocks
from kdcache.documents import Record
from kdcache.errors import KdcacheError, StoreError
from kdcache.store import CacheStore, layout
from kdcache.transfer_set import transfer_set_digest
from kdcache.verify.certificates import contradictions
from kdcache.verify.findings import Finding, kind_of_error
from kdcache.verify.standing import Standing, finding, plain_text, shard_place

LOOKED_UP_AT_ONCE = 65_536
_SPAN_ROUNDING = 1e-3
"""Share of the logits' span by which a decoded row may be wider: float32 and float16 round."""


class TeacherDecoding:
    """One teacher's shards, decoded; what it needs is read once, by whichever thread comes first.

    Parameters
    ----------
    standing : Standing
    name : str
        The stored teacher, whose document could be read.
    """

    def __init__(self, standing: Standing, name: str) -> None:
        self._standing = standing
        self._document = standing.teachers[name]
        self._lock = threading.Lock()
        self._decoder: Decoder | None = None
        self._reader = standing.store.codes_reader(self._document, standing.cache, cache_bytes=0)

    def read(self, shard_index: int) -> np.ndarray:
        """Read a shard's codes [row, column] through the reader that training uses.

        Raises
        ------
        CorruptCacheError
            The shard is missing, torn or altered, or has a hole.
        """
        return self._reader.read_shard(shard_index)

    def check(self, record: Record) -> Iterator[Finding]:
        """Read and decode a shard whose digest is right, and hold it against its record.

        What is looked at: every chunk's checksum; the number of rows; the fill code; NaN and infinity among the decoded
        logits, and rows without any class; the span of decoded rows, which may not pass that of the teacher's logits by
        more than the certified error range; and the record's statistics against each other.
        """
        store, key = self._standing.store, layout.shard_key(record.teacher, record.shard_index)
        about: dict[str, Any] = {"teacher": record.teacher, "shard_index": record.shard_index}
        about["where"] = shard_place(record.teacher, record.shard_index)
        try:
            codes = self.read(record.shard_index)
        except StoreError:  # the store could not be asked, which says nothing of the cache
            raise
        except KdcacheError as error:
            kind = "hole" if "fill code" in str(error) else kind_of_error(error, is_there=True)
            yield finding(store, key, plain_text(error), kind, **about)
            return
        if len(codes) != record.num_rows:
            what = f"it has {len(codes)} rows, its record says {record.num_rows}"
            yield finding(
                store, key, what, "contradicts", expected=str(record.num_rows), found=str(len(codes)), **about
            )
        try:
            spoiled, widest = self._decoded(codes)
        except StoreError:
            raise
        except KdcacheError as error:  # of the teacher's document or parameters: one finding, whichever shard
            teacher_key = layout.metadata_key(layout.teacher_group(record.teacher))
            yield finding(store, teacher_key, plain_text(error), "contradicts", teacher=record.teacher)
            return
        if spoiled:
            what = f"{len(spoiled)} row(s) decode to NaN, +inf or no class, the first is row {spoiled[0]} of the shard"
            yield finding(store, key, what, "not_finite", **about)
        for what in (*_too_wide(widest, record), *contradictions(record, self._document.codec)):
            record_key = layout.record_key(record.teacher, record.shard_index)
            yield finding(store, record_key, f"its record {what}", "contradicts", **about)

    @torch.inference_mode()
    def _decoded(self, codes: np.ndarray) -> tuple[list[int], float]:
        """Decode rows; give those with NaN, +inf or nothing but -inf, and the widest span of finite logits."""
        decoder, values = self._opened(), torch.from_numpy(codes)
        spoiled: list[int] = []
        widest = 0.0
        for rows in row_blocks(len(codes), decoder.codec.num_classes):
            logits = decoder.decode(values[rows])
            highest, lowest = logits.amax(dim=1), logits.amin(dim=1)
            if not bool((highest - lowest).isfinite().all()):  # masked classes, or worse
                is_bad = ~highest.isfinite()  # the largest is NaN where one is
                spoiled += (rows.start + is_bad.nonzero()[:, 0]).tolist()
                lowest = logits.masked_fill(logits.isneginf(), torch.inf).amin(dim=1)
            widest = max(widest, float((highest - lowest).nan_to_num(0.0, 0.0, 0.0).max()))
        return spoiled, widest

    def _opened(self) -> Decoder:
        with self._lock:
            if self._decoder is None:
                self._decoder = open_decoder(self._standing.store, self._document)
            return self._decoder


def check_examples(standing: Standing) -> Iterator[Finding]:
    """Hold the example table against the cache document, and the id index against the table, example by example."""
    store, cache = standing.store, standing.cache
    try:
        table = store.examples()
    except StoreError:
        raise
    except KdcacheError as error:
        is_there = store.objects.size(layout.EXAMPLES) is not None
        if is_there or standing.complete is not None:
            yield finding(store, layout.EXAMPLES, plain_text(error), kind_of_error(error, is_there=is_there))
        return
    found = transfer_set_digest(table.example_ids, table.num_rows, table.labels, table.input_digests)
    if found != cache.transfer_set_digest:
        what = f"holds a transfer set of digest {found}, the cache's is {cache.transfer_set_digest}"
        yield finding(store, layout.EXAMPLES, what, "contradicts", expected=cache.transfer_set_digest, found=found)
        return
    if int(table.num_rows.sum(dtype=np.int64)) != cache.num_rows:
        what = f"its examples have {table.num_rows.sum(dtype=np.int64)} rows, the cache document says {cache.num_rows}"
        yield finding(store, layout.EXAMPLES, what, "contradicts")
    yield from _index(
        store, table.example_ids, table.first_row, table.num_rows, is_complete=standing.complete is not None
    )


def _index(
    store: CacheStore, ids: np.ndarray, first_row: np.ndarray, num_rows: np.ndarray, *, is_complete: bool
) -> Iterator[Finding]:
    for start in range(0, len(ids), LOOKED_UP_AT_ONCE):
        part = slice(start, start + LOOKED_UP_AT_ONCE)
        try:
            found_first, found_num = store.lookup(ids[part])
        except StoreError:
            raise
        except KdcacheError as error:
            if is_complete:
                yield finding(store, layout.INDEX, plain_text(error), kind_of_error(error, is_there=True))
            return
        wrong = np.flatnonzero((found_first != first_row[part]) | (found_num != num_rows[part]))
        if len(wrong):
            place = start + int(wrong[0])
            what = (
                f"leads {len(wrong)} example(s) to other rows than the table's, the first is {ids.item(place)!r}: "
                f"row {found_first[wrong[0]]}, by the table {first_row[place]}"
            )
            yield finding(store, layout.INDEX, what, "contradicts")
            return


def _too_wide(widest: float, record: Record) -> Iterator[str]:
    if record.certificate.max_error_range is None:
        return
    span = record.max_logit - record.min_logit
    if widest > (span + record.certificate.max_error_range) * (1 + _SPAN_ROUNDING) + 1e-6:
        yield (
            f"says that logits lie from {record.min_logit:g} to {record.max_logit:g} and are off by up to "
            f"{record.certificate.max_error_range:g}; a decoded row spans {widest:g}"
        )
