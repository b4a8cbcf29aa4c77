"""Rates: rows a second from logits to what is kept, and from what is kept to soft targets, all in memory."""

from __future__ import annotations

__all__ = ["Rates", "rates"]

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from jaxtyping import Float
from torch import Tensor

from benchmarks.fidelity.lineup import Entry
from benchmarks.timing import interleaved

TEMPERATURE: Final = 2.0
_ELEMENTS: Final = 2**22
_ROUNDS: Final = 3


@dataclass(frozen=True)
class Rates:
    """Rows a second of processor time, one thread, median of interleaved rounds."""

    encode_rows_per_second: float
    decode_rows_per_second: float


def rates(entries: Sequence[Entry], logits: Float[Tensor, "row class"]) -> list[Rates]:
    """Time every entry on the same rows.

    Encoding is from float32 logits to what would be written; decoding, from there to dense soft targets at
    temperature 2, bits unpacked and curves evaluated. Files are left out on both sides: whose compression and whose
    container are quicker is another question.
    """
    num_rows = max(1, min(len(logits), _ELEMENTS // logits.shape[1]))
    block = logits[:num_rows].contiguous()
    contestants: dict[str, Callable[[], object]] = {}
    for number, entry in enumerate(entries):
        kept = {name: values[:num_rows].contiguous() for name, values in entry.kept.items()}
        contestants[f"encode {number}"] = lambda entry=entry: entry.contestant.encode(block)  # type: ignore[misc]
        contestants[f"decode {number}"] = lambda entry=entry, kept=kept: (  # type: ignore[misc]
            entry.contestant.soft_targets(kept, TEMPERATURE)
        )
    timings = interleaved(contestants, rounds=_ROUNDS, clock=time.process_time)
    return [
        Rates(num_rows / timings[f"encode {number}"].median, num_rows / timings[f"decode {number}"].median)
        for number in range(len(entries))
    ]
