"""Going on with a verification that was stopped: which shards it had found sound, in a file outside the cache.

The file names each sound shard with its size, its time of change where the store has one, and the digest of its
record, which holds the shard's own digest. A later run with the same file skips a shard all three of which are as they
were. That is right for going on after a stop, and for nothing else: bytes that rot on a disk change neither size nor
time. So the file is taken away when a run has looked at everything, and the next run reads everything again.
"""

from __future__ import annotations

__all__ = ["Progress", "open_progress"]

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.documents import Record
from kdcache.errors import OptionError
from kdcache.store import CacheStore, LocalObjects, layout
from kdcache.verify.findings import Level


class Progress:
    """Shards that were found sound, in memory and in a file that is added to line by line; safe between threads.

    Parameters
    ----------
    store : CacheStore
    path : Path or None
        Where to keep it; nowhere where absent.
    header : mapping
        What the run is about: it must be that of the run which began the file.
    """

    def __init__(self, store: CacheStore, path: Path | None, header: dict[str, Any]) -> None:
        self._store = store
        self._path = path
        self._lock = threading.Lock()
        self._sound: dict[tuple[str, int], list[Any]] = {}
        if path is not None:
            self._begin(path, header)

    def is_known(self, record: Record) -> bool:
        """Tell whether an earlier run found a record's shard sound, and it has not changed since."""
        known = self._sound.get((record.teacher, record.shard_index))
        return known is not None and known == self._state(record)

    def add(self, record: Record) -> None:
        """Note that a record's shard is sound."""
        if self._path is None:
            return
        line = json.dumps([record.teacher, record.shard_index, *self._state(record)]) + "\n"
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def end(self) -> None:
        """Take the file away: everything was looked at."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _state(self, record: Record) -> list[Any]:
        key = layout.shard_key(record.teacher, record.shard_index)
        return [self._store.objects.size(key), _changed_at(self._store, key), record.digest()]

    def _begin(self, path: Path, header: dict[str, Any]) -> None:
        if not path.exists():
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        begun = _parsed(lines[0]) if lines else None
        if begun != header:
            raise OptionError(
                f"the resume file {path} is not of this verification: it says {begun}, this one is {header}. Nothing "
                "was changed. Give another file, or delete it to begin anew"
            )
        for line in lines[1:]:
            entry = _parsed(line) if line.endswith("\n") else None  # the last may have been cut short
            if isinstance(entry, list) and len(entry) == 5:
                self._sound[str(entry[0]), entry[1]] = entry[2:]
        if not lines[-1].endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")


@contextlib.contextmanager
def open_progress(store: CacheStore, path: str | os.PathLike[str] | None, level: Level) -> Iterator[Progress]:
    """Open the file of a run, and take it away when the run has come to its end.

    Raises
    ------
    OptionError
        The file lies in the cache, or is that of another verification.
    """
    place = None if path is None else Path(path)
    if place is not None:
        _refuse_within(store, place)
    header = {"kdcache_verify": 1, "address": _identity(store), "level": level}
    progress = Progress(store, place, header)
    yield progress
    progress.end()


def _refuse_within(store: CacheStore, path: Path) -> None:
    if isinstance(store.objects, LocalObjects) and Path(store.address).resolve() in path.resolve().parents:
        raise OptionError(f"the resume file {path} would lie in the cache, which verifying does not change; move it")


def _identity(store: CacheStore) -> str:
    is_local = isinstance(store.objects, LocalObjects)
    return str(Path(store.address).resolve()) if is_local else store.address


def _changed_at(store: CacheStore, key: str) -> int | None:
    """Give a local file's time of change in nanoseconds; object stores have none that is read here."""
    if not isinstance(store.objects, LocalObjects):
        return None
    try:
        return (Path(store.address) / key).stat().st_mtime_ns
    except OSError:
        return None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
