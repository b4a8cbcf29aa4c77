"""The fault matrix: every file of a cache damaged in every way, and read through every reading path.

``python tests/stress/fault_matrix.py`` runs all of it and writes the table of docs/guarantees.md; tests run a part.
A *fault* changes stored bytes; a *reading* reads all rows of the cache. Three outcomes are right: an error of kdcache's
own that names the cache and what to run next; the right rows, where the reading has no need of what is damaged; and, of
an unfinished cache, the right rows under a mask. All others are failures: a wrong row, another error, an error that
names no remedy. Beside the readings `verify_cache` must find each fault.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kdcache
from kdcache.errors import KdcacheError
from kdcache.soft_targets import SoftTargets
from kdcache.store import Objects, open_objects

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
NUM_EXAMPLES = 40
FLIPS_A_FILE = 16
_OPTIONS: dict[str, Any] = {"shard_rows": 16, "chunk_rows": 8, "batch_size": 16}
_MARKS = ("<!-- table of faults -->", "<!-- end -->")

Files = dict[str, bytes]
Read = tuple[Any, Any, SoftTargets]
"""Ids, labels or None, and soft targets of some examples."""


# Caches ---------------------------------------------------------------------------------------------------------------


def build(address: str, *, codec: Any, ids: str, seed: int = 0) -> kdcache.SoftTargetCache:
    """Build a cache of two teachers, with ids that are numbers or texts."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(NUM_EXAMPLES, 4, generator=generator)
    order = torch.randperm(NUM_EXAMPLES, generator=generator).tolist()
    examples = kdcache.TransferSet.from_arrays(
        inputs,
        labels=[(3 * number + seed) % 5 for number in range(NUM_EXAMPLES)],
        example_ids=order if ids == "numbers" else [f"example-{number}" for number in order],
    )
    return kdcache.build_cache(
        address, examples, {"a": _teacher(seed), "b": _teacher(seed + 1)}, codec=codec, **_OPTIONS
    )


def _teacher(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


@dataclass(frozen=True)
class Truth:
    """What every example of an undamaged cache has: logits [teacher, class] and a label, by id."""

    logits: Mapping[Any, torch.Tensor]
    labels: Mapping[Any, int]

    @classmethod
    def of(cls, cache: kdcache.SoftTargetCache) -> Truth:
        ids = cache.example_ids.tolist()
        assert cache.labels is not None
        logits = cache.read(cache.example_ids).logits()
        return cls(dict(zip(ids, logits, strict=True)), dict(zip(ids, cache.labels.tolist(), strict=True)))

    def holds(self, read: Read) -> bool:
        """Tell whether all that was read is right; rows that are masked are not looked at."""
        ids, labels, soft_targets = read
        ids = ids.tolist() if isinstance(ids, torch.Tensor | np.ndarray) else list(ids)
        logits = soft_targets.logits()
        there = np.ones(len(ids), bool) if soft_targets.available is None else soft_targets.available.numpy()
        if len(logits) != len(ids) or any(one not in self.logits for one in ids):
            return False
        rows = all(torch.equal(logits[place], self.logits[ids[place]]) for place in np.flatnonzero(there))
        return rows and (labels is None or [self.labels[one] for one in ids] == [int(label) for label in labels])


# Readings -------------------------------------------------------------------------------------------------------------


def _by_id(address: str, folder: Path) -> Iterator[Read]:  # noqa: ARG001 - readings are called alike
    cache = kdcache.open_cache(address)
    yield cache.example_ids, cache.labels, cache.read(cache.example_ids)


def _known_ids(address: str, folder: Path) -> Iterator[Read]:  # noqa: ARG001
    cache = kdcache.open_cache(address)
    ids = range(NUM_EXAMPLES) if cache.document.example_id_type == "int64" else _texts()
    for one in ids:
        yield [one], None, cache.read([one])


def _texts() -> list[str]:
    return [f"example-{number}" for number in range(NUM_EXAMPLES)]


def _in_memory(address: str, folder: Path) -> Iterator[Read]:  # noqa: ARG001
    cache = kdcache.open_cache(address)
    cache.hold_in_memory()
    yield cache.example_ids, None, cache.read(cache.example_ids)


def _kept_locally(address: str, folder: Path) -> Iterator[Read]:
    cache = kdcache.open_cache(address, local_cache=folder / "pages")
    yield cache.example_ids, cache.labels, cache.read(cache.example_ids)


def _loader(**options: Any) -> Callable[[str, Path], Iterator[Read]]:
    def reading(address: str, folder: Path) -> Iterator[Read]:
        cache = kdcache.open_cache(address)
        more = {"local_copy": folder / "copy"} if options.get("tier") == "mapped" else {}
        yield from kdcache.SoftTargetLoader(cache, batch_size=16, **options, **more)

    return reading


def _joined(address: str, folder: Path) -> Iterator[Read]:  # noqa: ARG001
    cache = kdcache.open_cache(address)
    ids = list(range(NUM_EXAMPLES)) if cache.document.example_id_type == "int64" else _texts()
    batches = [{"example_id": ids[start : start + 16]} for start in range(0, NUM_EXAMPLES, 16)]
    for batch in cache.join(batches, max_resident_bytes=0):
        yield batch["example_id"], None, batch["soft_targets"]


def _incomplete(address: str, folder: Path) -> Iterator[Read]:  # noqa: ARG001
    cache = kdcache.open_cache(address, allow_incomplete=True)
    yield cache.example_ids, cache.labels, cache.read(cache.example_ids)


READINGS: dict[str, Callable[[str, Path], Iterator[Read]]] = {
    "read": _by_id,
    "read one by one": _known_ids,
    "hold_in_memory": _in_memory,
    "local_cache": _kept_locally,
    "loader, memory": _loader(tier="memory"),
    "loader, mapped": _loader(tier="mapped"),
    "loader, windows": _loader(tier="windows", shuffle="windowed"),
    "loader, scattered": _loader(tier="scattered"),
    "join": _joined,
    "allow_incomplete": _incomplete,
}
"""Every way to read rows, by name."""


# Faults ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Changes of a cache's files.

    Parameters
    ----------
    kind : str
    changes : mapping of str to bytes or None
        New bytes of files, by key; None deletes one.
    """

    kind: str
    changes: Mapping[str, bytes | None]

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.changes)}"


def faults_of(files: Files, others: Files, *, flips: int, seed: int = 0) -> Iterator[Fault]:
    """Give every fault of some files; `others` are those of another cache of the same shape."""
    drawn = np.random.default_rng(seed)
    for key, content in files.items():
        half = len(content) // 2
        yield Fault("missing", {key: None})
        yield Fault("zero-length", {key: b""})
        yield Fault("torn in the middle", {key: content[:half]})
        yield Fault("without its last byte", {key: content[:-1]})
        yield Fault("with a byte more", {key: content + b"\0"})
        yield Fault("zeroed from the middle on", {key: content[:half] + bytes(len(content) - half)})
        for _ in range(flips):
            yield Fault("one flipped bit", {key: _flipped(content, int(drawn.integers(8 * len(content))))})
        if others.get(key, content) != content:
            yield Fault("another cache's file", {key: others[key]})
    yield from _exchanged(files, r"teachers/\w+/codes/c/\d+/\d+", "two shards exchanged")
    yield from _exchanged(files, r"commits/\w+/\d+\.json", "two records exchanged")
    yield from _copied_over(files, r"teachers/\w+/codes/c/\d+/\d+", "another shard's copy")


def extra_faults(files: Files) -> Iterator[Fault]:
    """Give files too many: they harm no row, and need not be found."""
    shard = next(content for key, content in files.items() if re.fullmatch(r"teachers/\w+/codes/c/\d+/\d+", key))
    yield Fault("an extra shard", {"teachers/a/codes/c/99/0": shard})
    yield Fault("an extra record", {"commits/a/99.json": files["commits/a/0.json"]})
    yield Fault("a foreign file", {"notes.txt": b"not a cache's"})
    yield Fault("an extra teacher", {"teachers/z/zarr.json": files["teachers/a/zarr.json"]})


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _exchanged(files: Files, pattern: str, kind: str) -> Iterator[Fault]:
    for one, other in pairwise(sorted(key for key in files if re.fullmatch(pattern, key))):
        yield Fault(kind, {one: files[other], other: files[one]})


def _copied_over(files: Files, pattern: str, kind: str) -> Iterator[Fault]:
    for one, other in pairwise(sorted(key for key in files if re.fullmatch(pattern, key))):
        yield Fault(kind, {one: files[other]})


# Running --------------------------------------------------------------------------------------------------------------

RIGHT = frozenset({"error", "right rows", "found"})


@dataclass
class Matrix:
    """Outcomes, counted by kind of fault and reading; and every failure in words."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, fault: Fault, reading: str, outcome: str, told: str) -> None:
        self.counts[fault.kind, reading, outcome] += 1
        if outcome not in RIGHT:
            self.failures.append(f"{fault} | {reading} | {outcome} | {told}")

    def total(self, *, outcome: str | None = None, kind: str | None = None, reading: str | None = None) -> int:
        """Count trials of an outcome, a kind and a reading; of all where absent."""
        return sum(
            count
            for (of_kind, of_reading, of_outcome), count in self.counts.items()
            if kind in {None, of_kind} and reading in {None, of_reading} and outcome in {None, of_outcome}
        )


def files_at(objects: Objects) -> Files:
    """Read all files of a cache."""
    return {key: objects.read(key) for key in objects.list("")}


def run_faults(
    matrix: Matrix,
    address: str,
    faults: Iterator[Fault],
    *,
    readings: Mapping[str, Any] = READINGS,
    verifies: bool = True,
) -> None:
    """Try faults at an address, one at a time; the cache is whole again behind each.

    Parameters
    ----------
    verifies : bool
        `verify_cache` is to find the faults as well.
    """
    objects = open_objects(address)
    truth = Truth.of(kdcache.open_cache(address))
    for fault in faults:
        standing = {key: objects.read(key) for key in fault.changes if objects.size(key) is not None}
        try:
            _change(objects, fault.changes)
            for name, reading in readings.items():
                matrix.add(fault, name, *_outcome(reading, address, truth))
            if verifies and not _means_the_same(fault, standing):
                matrix.add(fault, "verify", *_verified(address))
        finally:
            _change(objects, {key: standing.get(key) for key in fault.changes})


def _change(objects: Objects, changes: Mapping[str, bytes | None]) -> None:
    for key, content in changes.items():
        if content is None:
            objects.delete(key)
        else:
            objects.replace(key, content)


def _outcome(reading: Callable[[str, Path], Iterator[Read]], address: str, truth: Truth) -> tuple[str, str]:
    folder = Path(tempfile.mkdtemp(prefix="kdcache-faults-"))
    try:
        return ("right rows", "") if all(map(truth.holds, reading(address, folder))) else ("WRONG ROWS", "")
    except KdcacheError as error:
        is_helpful = address in str(error) and re.search(r"`kdcache \w+|[Bb]uild|allow_incomplete", str(error))
        return ("error" if is_helpful else "unhelpful error"), f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - any other error is a failure of its own kind
        return "another error", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)


def _verified(address: str) -> tuple[str, str]:
    try:
        report = kdcache.verify_cache(address)
    except KdcacheError as error:
        return "found", str(error)
    except Exception as error:  # noqa: BLE001
        return "another error", f"{type(error).__name__}: {error}"
    return ("not found" if report.is_sound and report.is_complete else "found"), ""


def _means_the_same(fault: Fault, standing: Files) -> bool:
    """Tell whether JSON was changed in a way that leaves its meaning, such as a number's seventeenth digit."""
    for key, content in fault.changes.items():
        try:
            if content is None or json.loads(content) != json.loads(standing[key]):
                return False
        except (ValueError, KeyError):
            return False
    return True


CACHES: Mapping[str, tuple[Any, str]] = {
    "codes": (kdcache.Codes(), "texts"),
    "spectral": (kdcache.Spectral(max_kl=0.01), "numbers"),
}
"""Codec and kind of ids of each cache, by name."""


def run_cache(
    name: str,
    folder: str,
    *,
    flips: int = FLIPS_A_FILE,
    readings: Mapping[str, Any] = READINGS,
    matrix: Matrix | None = None,
    only: Callable[[Fault], bool] = lambda _: True,
) -> Matrix:
    """Run faults over one of the caches, built below an address together with another of the same shape."""
    matrix = Matrix() if matrix is None else matrix
    codec, ids = CACHES[name]
    address, other = f"{folder}/{name}", f"{folder}/{name}-other"
    build(address, codec=codec, ids=ids)
    build(other, codec=codec, ids=ids, seed=7)
    files, others = (files_at(open_objects(one)) for one in (address, other))
    damages = filter(only, faults_of(files, others, flips=flips))
    run_faults(matrix, address, damages, readings=readings)
    run_faults(matrix, address, filter(only, extra_faults(files)), readings=readings, verifies=False)
    return matrix


def table_of(matrix: Matrix) -> str:
    """Give the table of docs/guarantees.md."""
    lines = [
        "| fault | trials | errors | right rows | wrong rows | found by verify |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in dict.fromkeys(kind for kind, _, _ in matrix.counts):
        found, asked = matrix.total(kind=kind, outcome="found"), matrix.total(kind=kind, reading="verify")
        trials = matrix.total(kind=kind) - asked
        shares = [matrix.total(kind=kind, outcome=outcome) for outcome in ("error", "right rows", "WRONG ROWS")]
        lines.append(
            f"| {kind} | {trials:,} | {shares[0]:,} | {shares[1]:,} | {shares[2]:,} | {found:,} of {asked:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all faults, say what failed, and write the table where nothing did."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix()
        for name in CACHES:
            run_cache(name, folder, matrix=matrix)
    sys.stdout.write(table_of(matrix) + "\n" + "".join(f"{failure}\n" for failure in matrix.failures))
    if matrix.failures:
        sys.exit(1)
    page = PAGE.read_text()
    start, end = page.index(_MARKS[0]) + len(_MARKS[0]), page.index(_MARKS[1])
    PAGE.write_text(f"{page[:start]}\n{table_of(matrix)}\n{page[end:]}")


if __name__ == "__main__":
    main()
