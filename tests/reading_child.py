"""A process that reads caches which may be anyone's, and tells what came of it: one JSON line in, one out.

A line in names a cache and its examples' ids. The line out holds `outcomes`, one a reading ("rows", or an error of
kdcache's own), and `failures`: other errors, wrong shapes, and whatever was done outside the cache, as Python's audit
events tell. Address space is limited to a GiB above what the process has once everything is imported.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kdcache
from kdcache.errors import KdcacheError
from kdcache.soft_targets import SoftTargets

HEADROOM_BYTES = 2**30
SECONDS_TO_SHOW = 15
"""Reading goes on for longer than this: its stack is shown, before whoever waits gives up."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("import", "exec", "compile", "pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_PROGRAM = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})


class Watch:
    """Notes what audit events tell of the outside, while a cache is read."""

    def __init__(self) -> None:
        self.cache: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.cache is None:
            return
        if event in _FORBIDDEN or event.startswith(("os.exec", "os.fork", "os.posix_spawn", "socket.connect")):
            self.seen.append(f"{event} {str(arguments)[:300]}")
        elif event in _CHANGES:
            self.seen.append(f"{event} {arguments[:2]}")
        elif event in {"open", "os.listdir", "os.scandir"} and not isinstance(arguments[0], int | None):
            flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if flags & _WRITES or not path.startswith((self.cache, *_PROGRAM)):
                self.seen.append(f"{event} {path} {flags:o}")


def _checked(targets: SoftTargets, cache: kdcache.SoftTargetCache, num_ids: int) -> None:
    num_rows = num_ids if targets.num_rows is None else int(targets.num_rows.sum())
    probabilities = targets.probabilities(2.0, mean="arithmetic")
    shape = (num_rows, cache.document.num_classes)
    if tuple(probabilities.shape) not in {shape, (num_rows, len(targets.teacher_names), shape[1])}:
        raise AssertionError(f"probabilities have shape {tuple(probabilities.shape)}, expected {shape}")


def _read(address: str, ids: list[Any]) -> None:
    cache = kdcache.open_cache(address)
    _checked(cache.read(ids), cache, len(ids))
    cache.certificate(2.0)


def _read_all(address: str, ids: list[Any]) -> None:  # noqa: ARG001 - readings are called alike
    cache = kdcache.open_cache(address)
    _checked(cache.read(cache.example_ids), cache, len(cache.example_ids))
    if cache.labels is not None and len(cache.labels) != cache.document.num_examples:
        raise AssertionError(f"{len(cache.labels)} labels")


def _incomplete(address: str, ids: list[Any]) -> None:
    cache = kdcache.open_cache(address, allow_incomplete=True)
    _checked(cache.read(ids), cache, len(ids))


def _loader(address: str, ids: list[Any]) -> None:  # noqa: ARG001
    cache = kdcache.open_cache(address)
    count = 0
    for example_ids, _, targets in kdcache.SoftTargetLoader(cache, batch_size=16, tier="scattered"):
        _checked(targets, cache, len(example_ids))
        count += len(example_ids)
    if count != cache.document.num_examples:
        raise AssertionError(f"the loader gave {count} of {cache.document.num_examples} examples")


def _verify(level: Any) -> Callable[[str, list[Any]], None]:
    return lambda address, ids: kdcache.verify_cache(address, level=level).findings and None  # noqa: ARG005


READINGS: dict[str, Callable[[str, list[Any]], None]] = {
    "read": _read,
    "read all": _read_all,
    "incomplete": _incomplete,
    "loader": _loader,
    "verify digests": _verify("digests"),
    "verify deep": _verify("deep"),
    "repair": lambda address, ids: kdcache.repair_cache(address, dry_run=True).findings and None,  # noqa: ARG005
}


def _outcomes(address: str, ids: list[Any], watch: Watch) -> dict[str, Any]:
    outcomes, failures = {}, []
    for name, reading in READINGS.items():
        try:
            reading(address, ids)
            outcomes[name] = "rows"
        except KdcacheError as error:
            outcomes[name] = type(error).__name__
            if address not in str(error):
                failures.append(f"{name}: an error that does not name the cache: {error}")
        except BaseException as error:  # noqa: BLE001 - any other error is what is looked for
            watched, watch.cache = watch.cache, None  # showing where it came from reads the program's text
            failures.append(
                f"{name}: {type(error).__name__}: {str(error)[:500]}\n{''.join(traceback.format_exc()[-2500:])}"
            )
            watch.cache = watched
    failures += [f"outside the cache: {seen}" for seen in watch.seen]
    watch.seen.clear()
    return {"outcomes": outcomes, "failures": failures}


def main() -> None:
    """Warm up with the caches that are named on the command line, then serve lines until the input ends."""
    torch.set_num_threads(1)
    watch = Watch()
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for cache in sys.argv[1:]:
        _outcomes(cache, json.loads((Path(cache).parent / f"{Path(cache).name}.ids").read_text()), watch)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    for line in sys.stdin:
        asked = json.loads(line)
        watch.cache = os.path.realpath(asked["cache"])
        faulthandler.dump_traceback_later(SECONDS_TO_SHOW)
        answer = _outcomes(asked["cache"], asked["ids"], watch)
        watch.cache = None
        faulthandler.cancel_dump_traceback_later()
        told.write(json.dumps(answer) + "\n")
        told.flush()


if __name__ == "__main__":
    main()
