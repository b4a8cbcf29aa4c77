"""Builds, additions and repairs that are killed at random moments, and run again: ``kill_moments.py FOLDER NUM SEED``.

The program imports what a build imports, starts no thread, and forks a process for each run, so that the time until a
kill is spent in the build alone and not in importing torch. For every kill it prints a line of JSON: what was run, the
moment, how many shards had a record, what a reader said then, and what the same call made of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 - before the forks, as all that follows
import torch
import zarr  # noqa: F401

import kdcache
import kdcache.build.comparison
import kdcache.repair
from kdcache.errors import CacheNotFoundError, CorruptCacheError, IncompleteCacheError

NUM_EXAMPLES = 1024
SHARD_ROWS = 32
NUM_SHARDS = NUM_EXAMPLES // SHARD_ROWS
NUM_CLASSES = 16
OPTIONS: dict[str, Any] = {
    "codec": kdcache.Lossless(), "shard_rows": SHARD_ROWS, "chunk_rows": 16, "batch_size": SHARD_ROWS,
    "num_classes": NUM_CLASSES, "num_pilot_rows": 64,
}  # fmt: skip


class CountingTeacher(torch.nn.Linear):
    """Notes each batch in a file that outlives the process."""

    def __init__(self, seed: int, notes: Path) -> None:
        torch.manual_seed(seed)
        super().__init__(8, NUM_CLASSES)
        self.notes = notes

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with self.notes.open("ab") as file:
            file.write(b".")
        time.sleep(0.001)
        return super().forward(inputs)


def transfer_set() -> kdcache.TransferSet:
    inputs = torch.randn(NUM_EXAMPLES, 8, generator=torch.Generator().manual_seed(0))
    return kdcache.TransferSet.from_arrays(inputs, labels=[number % 5 for number in range(NUM_EXAMPLES)])


def teachers(names: str, notes: Path) -> dict[str, torch.nn.Module]:
    return {name: CountingTeacher(ord(name), notes) for name in names}


def build(folder: Path) -> None:
    kdcache.build_cache(folder / "cache", transfer_set(), teachers("ab", folder / "notes"), **OPTIONS)


def add(folder: Path) -> None:
    kdcache.build_cache(
        folder / "cache", transfer_set(), teachers("abc", folder / "notes"), add_teachers=True, **OPTIONS
    )


def repair(folder: Path) -> None:
    kdcache.repair_cache(folder / "cache", transfer_set(), teachers("ab", folder / "notes"))


def damage(folder: Path) -> None:
    """Flip a bit of every fourth shard of a teacher, and lose a record, a part of the index and the root."""
    for shard in range(0, NUM_SHARDS, 4):
        path = folder / f"cache/teachers/a/codes/c/{shard}/0"
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        path.write_bytes(content)
    (folder / "cache/commits/b/3.json").unlink()
    (folder / "cache/index/fences/c/0/0").unlink()
    (folder / "cache/zarr.json").unlink()


WORKS: dict[str, Callable[[Path], None]] = {"build": build, "add": add, "repair": repair}


def forked(work: Callable[[Path], Any], folder: Path, *, seconds: float | None = None) -> str:
    """Run in a process of its own, killed after some seconds; gives what it said, "" where it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            torch.set_num_threads(1)
            os.write(write, json.dumps(work(folder)).encode())
            code = 0
        except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


def state(folder: Path) -> dict[str, Any]:
    """Read the cache: whether it opens, and what its data are; every row of what opens is read."""
    try:
        cache = kdcache.open_cache(folder / "cache")
    except (IncompleteCacheError, CacheNotFoundError) as error:
        return {"opens": False, "error": type(error).__name__}
    logits = cache.read(cache.example_ids).logits()
    expected = torch.stack(
        [one.eval()(_inputs()) for one in teachers("".join(cache.teacher_names), Path(os.devnull)).values()], 1
    )
    return {
        "opens": True, "is_right": bool(torch.equal(logits, expected)), "teachers": len(cache.teacher_names),
        "data_digest": cache.complete.data_digest if cache.complete else None,
        "is_sound": kdcache.verify_cache(folder / "cache").is_sound,
    }  # fmt: skip


def _inputs() -> torch.Tensor:
    return torch.randn(NUM_EXAMPLES, 8, generator=torch.Generator().manual_seed(0))


def attempt(work: str, folder: Path, *, seconds: float) -> dict[str, Any]:
    """Kill one run, look at what is left, and run it again."""
    prepare(work, folder)
    before = len(list(folder.glob("cache/commits/*/*.json")))
    calls_before = _num_calls(folder)
    killed = forked(WORKS[work], folder, seconds=seconds)
    records = len(list(folder.glob("cache/commits/*/*.json")))
    left = forked(_left, folder)
    again = forked(WORKS[work], folder)
    return {
        "work": work, "seconds": seconds, "was_killed": killed == "", "records_before": before, "records": records,
        "left": json.loads(left) if left.startswith("{") else left, "again": again,
        "end": json.loads(forked(state, folder)), "num_calls": _num_calls(folder) - calls_before,
        "partials": len(list((folder / "cache").rglob(".*.partial"))),
    }  # fmt: skip


def _left(folder: Path) -> dict[str, Any]:
    try:
        return state(folder)
    except CorruptCacheError as error:  # of what is being repaired
        return {"opens": False, "error": f"{type(error).__name__}"}


def _num_calls(folder: Path) -> int:
    notes = folder / "notes"
    return notes.stat().st_size if notes.exists() else 0


def prepare(work: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if work == "build":
        folder.mkdir(parents=True)
        return
    finished = folder.with_name("finished")
    if not finished.exists():
        finished.mkdir(parents=True)
        forked(build, finished)
    shutil.copytree(finished, folder)
    if work == "repair":
        damage(folder)


def main(folder: str, num_kills: str, seed: str) -> None:
    drawn = random.Random(int(seed))  # noqa: S311 - moments, no secrets
    base = Path(folder)
    lasts = {}
    for work, run in WORKS.items():
        prepare(work, base / "undisturbed")
        start = time.monotonic()
        forked(run, base / "undisturbed")
        lasts[work] = time.monotonic() - start
        end = json.loads(forked(state, base / "undisturbed"))
        sys.stdout.write(json.dumps({"work": work, "undisturbed": end, "lasts": lasts[work]}) + "\n")
    for number in range(int(num_kills)):
        work = list(WORKS)[number % len(WORKS)]
        line = attempt(work, base / "killed", seconds=drawn.uniform(0, 0.9 * lasts[work]))
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
