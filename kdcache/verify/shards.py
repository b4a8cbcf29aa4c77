"""Verifying shards: each against its record, several at once, in memory that does not grow with the cache."""

from __future__ import annotations

__all__ = ["NUM_THREADS", "READ_BYTES", "CheckedShard", "ShardChecks", "digest_of"]

import hashlib
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kdcache.documents import Record
from kdcache.errors import CorruptCacheError, KdcacheError, StoreError
from kdcache.store import CacheStore, layout
from kdcache.threads import LoopThreads
from kdcache.verify.decoding import TeacherDecoding
from kdcache.verify.documents import as_written
from kdcache.verify.findings import Finding, Kind, Level, kind_of_error
from kdcache.verify.resuming import Progress
from kdcache.verify.standing import Standing, finding, plain_text, shard_place

NUM_THREADS = max(4, min(16, 2 * (os.cpu_count() or 1)))
"""Shards that are read and digested at once: more than processors, so that a disk always has something to do."""
DECODING_THREADS = max(1, min(4, os.cpu_count() or 1))
"""Shards that are decoded at once: each takes its codes and a block of logits."""
READ_BYTES = 4 * 2**20
"""What is read of a shard at a time to digest it. A level of digests takes `NUM_THREADS` times this from a local disk;
a deep one takes `DECODING_THREADS` times a shard, stored and decoded to codes, and a MiB of logits."""
_NUMBERED = re.compile(r".*/(0|[1-9][0-9]*)(?:\.json|/0)")


@dataclass(frozen=True)
class CheckedShard:
    """What is known of one shard.

    Parameters
    ----------
    name : str
    shard_index : int
    record : Record or None
        None where none stands, or it cannot be read.
    num_bytes : int
        Of the shard, where it was held against its record.
    is_skipped : bool
        Whether an earlier run found it sound.
    findings : tuple of Finding
    """

    name: str
    shard_index: int
    record: Record | None = None
    num_bytes: int = 0
    is_skipped: bool = False
    findings: tuple[Finding, ...] = field(default=())


class ShardChecks:
    """The checks of all shards of a cache.

    Parameters
    ----------
    standing : Standing
    level : Level
    progress : Progress
        Says what an earlier run found sound.
    """

    def __init__(self, standing: Standing, level: Level, progress: Progress) -> None:
        self._standing = standing
        self._store = standing.store
        self._level = level
        self._progress = progress
        self._decodings = self._open() if level != "quick" else {}
        self._shards = {name: self._shards_of(name) for name in standing.names}

    def __len__(self) -> int:
        return sum(map(len, self._shards.values()))

    def run(self) -> Iterator[CheckedShard]:
        """Yield every shard of every teacher, in order; of teachers that are being built, those that stand."""
        num_threads = DECODING_THREADS if self._level == "deep" else NUM_THREADS
        waiting: deque[Future[CheckedShard]] = deque()
        threads = LoopThreads(num_threads, "kdcache-verify")
        try:
            for name in self._standing.names:
                for shard_index in self._shards[name]:
                    waiting.append(threads.submit(self._checked, name, shard_index))
                    if len(waiting) > 2 * num_threads:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.leave()

    def _shards_of(self, name: str) -> Sequence[int]:
        """Give the shards to look at: all, or by lists those that stand, for a plan may claim any number of them."""
        num_shards = self._standing.cache.num_shards
        if name in self._standing.completed:
            return range(num_shards)
        folders = (layout.records_folder(name), f"{layout.teacher_group(name)}/{layout.CODES}/c")
        found = (_NUMBERED.fullmatch(key) for folder in folders for key in self._store.objects.list(folder))
        return sorted({int(number[1]) for number in found if number and int(number[1]) < num_shards})

    def _open(self) -> dict[str, TeacherDecoding]:
        opened = {}
        for name in self._standing.teachers:
            try:
                opened[name] = TeacherDecoding(self._standing, name)
            except StoreError:  # the store could not be asked, which says nothing of the cache
                raise
            except KdcacheError:  # of the array's metadata, whose own finding says it
                continue
        return opened

    def _checked(self, name: str, shard_index: int) -> CheckedShard:
        key = layout.record_key(name, shard_index)
        try:
            record = self._store.record(name, shard_index)
        except StoreError:
            raise
        except (KdcacheError, OSError) as error:
            is_there = self._store.objects.size(key) is not None
            kind = kind_of_error(error, is_there=is_there)
            return CheckedShard(
                name, shard_index, findings=(self._finding(key, name, shard_index, plain_text(error), kind),)
            )
        if record is None:
            return CheckedShard(name, shard_index, findings=tuple(self._without_record(name, shard_index)))
        found = [*self._of_record(record)]
        is_skipped = not found and self._progress.is_known(record)
        if not is_skipped:
            found += self._of_shard(record)
            if not found and self._level != "quick":
                self._progress.add(record)
        size = self._store.objects.size(layout.shard_key(name, shard_index)) or 0
        return CheckedShard(name, shard_index, record, size, is_skipped, tuple(found))

    def _without_record(self, name: str, shard_index: int) -> Iterator[Finding]:
        """Check a shard that a stopped build left without a record: it must be whole."""
        if name in self._standing.completed:
            key = layout.record_key(name, shard_index)
            yield self._finding(key, name, shard_index, "there is no record", "missing")
        key = layout.shard_key(name, shard_index)
        if name not in self._decodings or self._store.objects.size(key) is None:
            return
        try:
            self._decodings[name].read(shard_index)
        except CorruptCacheError as error:
            yield self._finding(key, name, shard_index, plain_text(error), "torn")

    def _of_record(self, record: Record) -> Iterator[Finding]:
        name, shard_index = record.teacher, record.shard_index
        key = layout.record_key(name, shard_index)
        for what in as_written(self._store, key, record):
            yield self._finding(key, name, shard_index, what, "altered")
        expected = self._standing.cache.rows_in_shard(shard_index)
        if record.num_rows != expected:
            what = f"its record says {record.num_rows} rows, the layout {expected}"
            sides = {"expected": str(expected), "found": str(record.num_rows)}
            yield self._finding(key, name, shard_index, what, "contradicts", **sides)

    def _of_shard(self, record: Record) -> Iterator[Finding]:
        name, shard_index = record.teacher, record.shard_index
        key = layout.shard_key(name, shard_index)
        size = self._store.objects.size(key)
        if size is None:
            what = f"{self._store.address}/{key}: the file is missing"
            yield self._finding(key, name, shard_index, what, "missing")
            return
        if size != record.num_bytes:
            kind: Kind = "torn" if size < record.num_bytes else "altered"
            what = f"it has {size} bytes, its record says {record.num_bytes}"
            sides = {"expected": str(record.num_bytes), "found": str(size)}
            yield self._finding(key, name, shard_index, what, kind, **sides)
            return
        if self._level == "quick":
            return
        digest = digest_of(self._store, key)
        if digest != record.sha256:
            what = f"its bytes were changed: it has digest {digest}, its record says {record.sha256}"
            sides = {"expected": record.sha256, "found": str(digest)}
            yield self._finding(key, name, shard_index, what, "altered", **sides)
        elif self._level == "deep" and name in self._decodings:
            yield from self._decodings[name].check(record)

    def _finding(self, key: str, name: str, shard_index: int, what: str, kind: Kind, **more: Any) -> Finding:
        where = shard_place(name, shard_index)
        return finding(self._store, key, what, kind, where=where, teacher=name, shard_index=shard_index, **more)


def digest_of(store: CacheStore, key: str) -> str | None:
    """Digest an object piece by piece; None where it is gone."""
    objects = store.objects
    size = objects.size(key)
    if size is None:
        return None
    digest = hashlib.sha256()
    ranges = [(start, min(READ_BYTES, size - start)) for start in range(0, size, READ_BYTES)]
    try:
        for piece in objects.read_ranges(key, ranges):
            digest.update(piece if isinstance(piece, bytes) else piece.data)
    except FileNotFoundError:  # taken away meanwhile
        return None
    return digest.hexdigest()
