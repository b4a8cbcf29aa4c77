"""A contestant's process, seen from outside: ask it, and end it."""

from __future__ import annotations

__all__ = ["ContestantError", "ContestantProcess"]

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

_ROOT: Final = Path(__file__).parents[2]
_END_SECONDS: Final = 10
_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class ContestantError(Exception):
    """A contestant cannot be installed, does not run, gives other rows, or does not answer."""


class ContestantProcess:
    """Runs `benchmarks.streaming.worker` for one contestant.

    Parameters
    ----------
    row_set, contestant : str
        Names.
    quick : bool
        A fifth of the rows.
    timeout_seconds : float
        How long an answer may take.
    """

    def __init__(self, row_set: str, contestant: str, *, quick: bool = False, timeout_seconds: float = 600) -> None:
        command = [sys.executable, "-m", "benchmarks.streaming.worker", row_set, contestant]
        self._timeout_seconds = timeout_seconds
        self._process = subprocess.Popen(
            [*command, *(["--quick"] if quick else [])], cwd=_ROOT, text=True, env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises
        ------
        ContestantError
            The contestant failed, ended or did not answer in time.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise ContestantError("the process has no pipes")
        try:
            self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ContestantError("its process ended") from error
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout_seconds):
                raise ContestantError(f"no answer to {do!r} in {self._timeout_seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise ContestantError(f"its process ended at {do!r}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def close(self) -> None:
        """Let the process end, so that packages give back shared memory; kill what does not, and what it started."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
