"""`verify_cache`: everything that stands, held against what vouches for it. Changes nothing."""

from __future__ import annotations

__all__ = ["verify_cache"]

import os
from collections.abc import Callable

from kdcache.errors import OptionError
from kdcache.store import CacheStore
from kdcache.verify.decoding import check_examples
from kdcache.verify.documents import check_completion, check_documents, check_whole
from kdcache.verify.extras import check_extras
from kdcache.verify.findings import Finding, Level, Note, VerifyReport
from kdcache.verify.planned import check_planned, check_recorded
from kdcache.verify.resuming import Progress, open_progress
from kdcache.verify.shards import ShardChecks
from kdcache.verify.standing import Records, Standing

LEVELS: tuple[Level, ...] = ("quick", "digests", "deep")


def verify_cache(
    address: str | os.PathLike[str],
    *,
    level: Level = "digests",
    resume_file: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Hold everything that stands of a cache against what vouches for it, and give every finding.

    What each level looks at, and what it cannot see:

    - ``quick``: documents, metadata, parameters and records against each other, and the size of every shard. Nothing
      large is read, so altered bytes of a shard, of the examples or of the index are not seen.
    - ``digests``: also every byte of every shard, of the examples and of the index against its SHA-256.
    - ``deep``: also every row through the reader that training uses, decoded: checksums, number of rows, fill codes,
      NaN and infinity, rows without a class, rows wider than the record's logits allow; the examples against the
      transfer set's digest, and the id index against the examples, example by example; and each certificate against
      itself, Hoeffding's bound and the codec's target. **Without the teacher** no one can tell whether the certified
      KL, error ranges, bounds and logits are those of the teacher, nor whether the stored logits are. For this see
      `kdcache.build.compare_with_teachers`, `kdcache verify --against-teacher`.

    Memory does not grow with the cache, but for one record a shard: at ``digests`` it is 4 MiB for each thread, at
    ``deep`` a shard for each thread, stored and decoded to codes, and a MiB of logits.

    Parameters
    ----------
    address : str or path
    level : {"quick", "digests", "deep"}
    resume_file : path, optional
        A file outside the cache that says which shards were found sound: after a stop, the same call goes on there. It
        is taken away when all has been looked at. Not for ``quick``.
    on_progress : callable (done shards, all shards), optional

    Returns
    -------
    VerifyReport
        Every finding, not the first alone; and notes of files that are no part of a cache.

    Raises
    ------
    CacheNotFoundError
        No cache stands there.
    DocumentError, CorruptCacheError
        Neither the root's cache document nor a plan can be read, so nothing can be said of the rest.
    OptionError
        There is no such level; or the resume file lies in the cache, or is of another verification.
    """
    if level not in LEVELS:
        raise OptionError(f"level is {level!r}; give one of {', '.join(LEVELS)}. Nothing was looked at")
    if level == "quick" and resume_file is not None:
        raise OptionError("a quick verification reads no shard, so there is nothing to resume: leave resume_file out")
    standing = Standing.read(CacheStore.at(address))
    with open_progress(standing.store, resume_file, level) as progress:
        return _verified(standing, level, progress, on_progress)


def _verified(
    standing: Standing, level: Level, progress: Progress, on_progress: Callable[[int, int], None] | None
) -> VerifyReport:
    findings = [*standing.findings, *check_documents(standing), *check_planned(standing), *check_whole(standing, level)]
    records: Records = {name: {} for name in standing.names}
    num_shards, num_bytes, num_skipped = 0, 0, 0
    checks = ShardChecks(standing, level, progress)
    for done, checked in enumerate(checks.run(), start=1):
        findings += checked.findings
        if checked.record is not None:
            records[checked.name][checked.shard_index] = checked.record
            num_shards += 1
        num_bytes += checked.num_bytes
        num_skipped += checked.is_skipped
        if on_progress is not None:
            on_progress(done, len(checks))
    findings += [*check_recorded(standing, records), *check_completion(standing, records)]
    if level == "deep":
        findings += check_examples(standing)
    extras = list(check_extras(standing))
    findings += (item for item in extras if isinstance(item, Finding))
    notes = tuple(item for item in extras if isinstance(item, Note))
    return VerifyReport(
        standing.store.address, level, standing.complete is not None, num_shards, num_bytes, num_skipped,
        tuple(dict.fromkeys(findings)), notes,
    )  # fmt: skip
