"""Files in a cache's folder that are no part of the cache."""

from __future__ import annotations

__all__ = ["REPAIR_CLAIMS", "check_extras"]

import re
from collections.abc import Iterator

from kdcache.store import layout
from kdcache.store.nodes import index_keys
from kdcache.verify.findings import Finding, Note
from kdcache.verify.standing import Standing, finding, shard_place

REPAIR_CLAIMS = "repairs"
"""Folder in which a repair at work says so."""
_SHARD = re.compile(rf"{layout.TEACHERS}/(?P<name>[^/]+)/{layout.CODES}/c/(?P<shard>[0-9]+)/0")
_RECORD = re.compile(rf"{layout.RECORDS}/(?P<name>[^/]+)/(?P<shard>[0-9]+)\.json")
_PLAN = re.compile(rf"{layout.PLANS}/[0-9]+\.json")


def check_extras(standing: Standing) -> Iterator[Finding | Note]:
    """Tell files that nothing reads, which are noted, from shards and records beyond the layout, which are findings."""
    known = {layout.ROOT, layout.EXAMPLES, layout.COMPLETE, *index_keys(standing.cache)}
    known.add(layout.metadata_key(layout.TEACHERS))
    parts = tuple(part for name in standing.names for part in _parts_of(standing, name))

    def told(key: str) -> bool:
        """Tell whether a file has a finding of its own: one too many spoils the index's digest."""
        return standing.complete is not None and key.startswith(f"{layout.INDEX}/")

    for key in standing.store.objects.list(""):
        numbered = _SHARD.fullmatch(key) or _RECORD.fullmatch(key)
        if numbered and numbered["name"] in standing.names:
            yield from _beyond(standing, key, numbered["name"], numbered["shard"])
        elif key not in known and not _PLAN.fullmatch(key) and not key.startswith(parts) and not told(key):
            yield Note(key, _said_of(standing, key))


def _parts_of(standing: Standing, name: str) -> Iterator[str]:
    group = layout.teacher_group(name)
    yield layout.metadata_key(group)
    yield layout.metadata_key(f"{group}/{layout.CODES}")
    document = standing.teachers.get(name)
    yield f"{group}/parameters-" if document is None else f"{group}/{document.parameters_group}/"


def _beyond(standing: Standing, key: str, name: str, shard: str) -> Iterator[Finding | Note]:
    if str(int(shard)) != shard:
        yield Note(key, "its number is not written as kdcache writes it: nothing reads it")
    elif int(shard) >= standing.cache.num_shards:
        what = f"the layout has {standing.cache.num_shards} shards, the last is {standing.cache.num_shards - 1}"
        where = shard_place(name, int(shard))
        yield finding(standing.store, key, what, "extra", where=where, teacher=name, shard_index=int(shard))


def _said_of(standing: Standing, key: str) -> str:
    first, _, rest = key.partition("/")
    name = rest.split("/")[0]
    if first in {layout.TEACHERS, layout.RECORDS} and rest and name not in standing.names:
        return f"is of a teacher {name!r} that no plan names: nothing reads it"
    if first == layout.TEACHERS and rest.startswith(f"{name}/parameters-"):
        return "is of another fit than the teacher's document names, as a second builder leaves it: nothing reads it"
    if first == REPAIR_CLAIMS and rest:
        return "is of a repair that is at work, or that was killed: the next repair takes it away"
    return "is no file of a cache: nothing reads it"
