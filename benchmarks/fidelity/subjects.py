"""The teachers whose soft targets are kept: recorded logits, split by example, and the time they take alive."""

from __future__ import annotations

__all__ = ["Subject", "open_subject"]

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.teachers import efficientnet, load, ppocr, smollm2
from kdcache.codecs.precision import quick_dtype

_NUM_ROWS: Final = {  # pilot at most, held out; the pilot of 4,000 crops is what the split leaves
    "smollm2": (2304, 768),
    "ppocr": (3072, 800),
    "efficientnet-lite0": (3072, 800),
    "efficientnet-lite1": (3072, 800),
    "efficientnet-lite2": (3072, 800),
}
_SEED: Final = 0


@dataclass(frozen=True, eq=False)
class Subject:
    """A teacher's logits over its main inputs; no example gives rows to both sides.

    Parameters
    ----------
    name : str
    row_word : str
        What a row is.
    pilot, held_out : Tensor [row, class]
        float32: what codecs are fitted to, and what all figures are measured on.
    """

    name: str
    row_word: str
    pilot: Float[Tensor, "row class"]
    held_out: Float[Tensor, "row class"]

    @property
    def num_classes(self) -> int:
        """Classes of a row."""
        return self.held_out.shape[1]


def open_subject(name: str, *, share: float = 1.0) -> Subject:
    """Open a teacher's recording, and make it on first use.

    Parameters
    ----------
    name : str
        A name of `benchmarks.teachers`.
    share : float, default 1
        Part of the usual rows to hold out, for a quick look; the pilot stays whole, since a basis needs its rows.
    """
    recorded = load(name)
    most_pilot, num_held_out = _NUM_ROWS[name]
    pilot, held_out = recorded.split(max(1, int(share * num_held_out)), seed=_SEED)
    spread = torch.linspace(0, len(pilot) - 1, min(most_pilot, len(pilot)), dtype=torch.float64).round().long()
    word = {"smollm2": "token", "ppocr": "frame"}.get(name, "view")
    return Subject(name, word, recorded.logits(pilot[spread]), recorded.logits(held_out))


def forward_seconds(name: str, *, rounds: int = 3) -> float:
    """Time the living teacher's forward pass: seconds a row, the quickest of some rounds, with torch's threads now."""
    run, num_rows = _LIVING[name]()
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / num_rows


def _smollm2() -> tuple[Callable[[], object], int]:
    teacher = smollm2.network().to(quick_dtype(torch.bfloat16, torch.device("cpu")))
    ids = smollm2.token_ids("main")[: 2 * smollm2.WINDOW].view(2, smollm2.WINDOW)
    return _inferring(lambda: teacher(ids)), ids.numel()


def _ppocr() -> tuple[Callable[[], object], int]:
    teacher = ppocr.network()
    picture = ppocr.pictures("main")[:1]
    return _inferring(lambda: [teacher(picture) for _ in range(4)]), 4 * teacher(picture).shape[1]


def _lite0() -> tuple[Callable[[], object], int]:
    teacher = efficientnet.network("lite0")
    shown = efficientnet.pictures("main")
    inputs = efficientnet.inputs("lite0", shown, efficientnet.crops("main", shown)[:16])
    return _inferring(lambda: teacher(inputs)), len(inputs)


def _inferring(run: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(run)


_LIVING: Final = {"smollm2": _smollm2, "ppocr": _ppocr, "efficientnet-lite0": _lite0}
