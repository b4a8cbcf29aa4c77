"""A contestant's process: opens what is stored and does what it is told, a line of JSON for each command.

``python -m benchmarks.streaming.worker ROW_SET CONTESTANT [--quick]``; commands come on standard input, answers go to
standard output, and whatever a package prints goes to standard error.
"""

from __future__ import annotations

__all__ = ["Worker"]

import gc
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.streaming.content import check_epoch
from benchmarks.streaming.contestant import Contestant, Epoch
from benchmarks.streaming.lineup import contestant_named
from benchmarks.streaming.resources import MemoryPeak, children_cpu_seconds, cpu_seconds, own_memory_bytes
from benchmarks.streaming.row_sets import RowSet, open_row_set


class Worker:
    """Carries out commands on one contestant and one row set."""

    def __init__(self, row_set: RowSet, contestant: Contestant) -> None:
        self._row_set = row_set
        self._contestant = contestant
        self._epochs: Epoch | None = None
        for module in contestant.modules:
            importlib.import_module(module)

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a command: write, check, epoch or fresh."""
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "write": self._write, "check": self._check, "epoch": self._epoch, "fresh": self._fresh,
        }  # fmt: skip
        return answers[command["do"]](**{key: value for key, value in command.items() if key != "do"})

    def _opened(self) -> Epoch:
        if self._epochs is None:
            self._epochs = self._contestant.open_epochs(self._contestant.stored(self._row_set))
        return self._epochs

    def _write(self) -> dict[str, Any]:
        folder = self._row_set.stored(self._contestant.stored_as)
        if self._contestant.write is None or folder.is_dir():
            return {}
        making = folder.with_name(f".{folder.name}-making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        self._contestant.write(self._row_set, making)
        making.rename(folder)
        return {}

    def _check(self) -> dict[str, Any]:
        in_place = check_epoch(self._opened()(0), self._contestant.true_columns(self._row_set))
        return {"in_place_rows": in_place}

    def _epoch(self, number: int, min_seconds: float, max_seconds: float) -> dict[str, Any]:
        """Read epochs until they have lasted a while; a slow one is broken off."""
        opened = self._opened()
        cpu, children, start = cpu_seconds(), children_cpu_seconds(), time.perf_counter()
        num_rows, seconds = 0, 0.0
        while seconds < min_seconds:
            for rows, _ in opened(number):
                num_rows += len(rows)
                if time.perf_counter() - start > max_seconds:
                    break
            number += 1
            seconds = time.perf_counter() - start
        cpu = cpu_seconds() - cpu
        gc.collect()  # ends the processes of a DataLoader, so that their time is counted; its own is not
        return {"rows": num_rows, "seconds": seconds, "cpu_seconds": cpu + children_cpu_seconds() - children}

    def _fresh(self, max_seconds: float) -> dict[str, Any]:
        """Open and read an epoch while memory is watched; of a process that has done nothing else."""
        before, start = own_memory_bytes(), time.perf_counter()
        first_batch_seconds, num_rows, seconds = None, 0, 0.0
        with MemoryPeak() as peak:
            for rows, _ in self._opened()(0):
                num_rows += len(rows)
                seconds = time.perf_counter() - start
                first_batch_seconds = seconds if first_batch_seconds is None else first_batch_seconds
                if seconds > max_seconds:
                    break
        return {
            "rows": num_rows,
            "seconds": seconds,
            "first_batch_seconds": first_batch_seconds, "bytes": max(0, peak.num_bytes - before), "bytes_before": before
        }  # fmt: skip


def main() -> None:
    """Answer the commands of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    name, contestant = sys.argv[1:3]
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(open_row_set(name, quick="--quick" in sys.argv), contestant_named(contestant))
            answer = worker.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever stops a contestant is told in the table
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if "--trace" in sys.argv:
                import traceback

                traceback.print_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
