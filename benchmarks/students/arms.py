"""The ways to keep soft targets that students are given, each encoded, written and decoded as it really is."""

from __future__ import annotations

__all__ = ["FULL", "Arm", "FullLogits", "open_arms"]

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from jaxtyping import BFloat16, Float, Float64
from torch import Tensor

from benchmarks.fidelity.lineup import Family, largest, named_specs
from benchmarks.fidelity.measures import Contestant
from benchmarks.fidelity.ours import Ours
from benchmarks.fidelity.peers import DistillKit, Kept, Peer, RandomSampling
from benchmarks.students.subjects import Subject, thinned
from kdcache.documents import CodecSpec, Codes

FULL: Final = "full logits"
_BUDGET_SETTING: Final = "max_kl=0.02"  # other systems are given the bytes of this arm
_PILOT_ROWS: Final = 2304
_SIZING_ROWS: Final = 256
_BLOCK_ROWS: Final = 512
_MOST_DRAWS: Final = 2**14


@dataclass(frozen=True, eq=False)
class Arm:
    """Soft targets of the rows to learn from, kept in one way.

    Parameters
    ----------
    contestant : Contestant
        The way.
    kept : mapping of str to Tensor
        What it keeps of the rows; read back from its files where it is another system's.
    row_bytes : float
        Of rows held out, on disk, as benchmarks.fidelity counts them; of the full logits, in memory. Rows of the pilot
        itself take less, which a larger cache has few of.
    temperature : float, optional
        The only temperature at which students are given it; None: at any.
    """

    contestant: Contestant
    kept: Kept
    row_bytes: float
    temperature: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether kdcache keeps it."""
        return isinstance(self.contestant, Ours)

    @property
    def name(self) -> str:
        """The way and its setting."""
        return ", ".join(word for word in (self.contestant.name, self.contestant.setting) if word)

    def soft_targets(self, temperature: float) -> BFloat16[Tensor, "row class"]:
        """Decode all rows to soft targets; bfloat16 keeps the smallest and rounds by 0.2 % at most."""
        num_rows = len(next(iter(self.kept.values())))
        blocks = []
        for start in range(0, num_rows, _BLOCK_ROWS):
            block = {name: values[start : start + _BLOCK_ROWS] for name, values in self.kept.items()}
            blocks.append(self.contestant.soft_targets(block, temperature).bfloat16())
        return torch.cat(blocks)


class FullLogits:
    """Keeps everything, in float32."""

    name = FULL
    setting = "float32"

    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Give the logits."""
        return {"logits": logits}

    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Soften."""
        return (kept["logits"] / temperature).softmax(dim=1)

    def log_soft_targets(self, kept: Kept, temperature: float) -> Float64[Tensor, "row class"]:
        """Soften, in float64."""
        return (kept["logits"].double() / temperature).log_softmax(dim=1)


def open_arms(subject: Subject, temperatures: Sequence[float], folder: Path) -> Iterator[Arm]:
    """Keep a teacher's rows in every way: full, by kdcache's codecs, and by other systems at about spectral's bytes.

    Parameters
    ----------
    subject : Subject
        Codecs are fitted to 2,304 of the rows to learn from, spread evenly.
    temperatures : sequence of float
        Those that students learn at; random sampling draws at 1, and again at each of the others for it alone.
    folder : Path
        Where caches are built and other systems' files written.

    Yields
    ------
    Arm
        The full logits first.

    Raises
    ------
    ValueError
        Another system keeps not a single class within spectral's bytes.
    """
    logits, held_out = subject.train_logits, subject.held_out_logits
    full = FullLogits()
    yield Arm(full, full.encode(logits), 4.0 * subject.num_classes)
    budget = 0.0
    pilot = logits[thinned(torch.arange(len(logits)), _PILOT_ROWS)]
    for number, (name, setting, spec) in enumerate(_specs(subject.num_classes)):
        ours = Ours(f"kdcache {name}", setting, spec, pilot, folder / f"cache-{number}")
        row_bytes = ours.sizes(_encoded(ours, held_out)).row_bytes
        budget = row_bytes if setting == _BUDGET_SETTING else budget
        yield Arm(ours, _encoded(ours, logits), row_bytes)
    sample = held_out[thinned(torch.arange(len(held_out)), _SIZING_ROWS)]
    for number, (family, temperature) in enumerate(_peers(subject.num_classes, temperatures)):
        size = largest(family, budget, sample)
        if size == 0:
            raise ValueError(f"{family.make(1).name} keeps nothing of {len(sample)} rows in {budget:.0f} bytes each")
        peer = family.make(size)
        row_bytes = peer.write(_encoded(peer, held_out), folder / f"sized-{number}") / len(held_out)
        peer.write(_encoded(peer, logits), folder / f"peer-{number}")
        yield Arm(peer, peer.load(folder / f"peer-{number}"), row_bytes, temperature)


def _specs(num_classes: int) -> Iterator[tuple[str, str, CodecSpec]]:
    """Give the settings of benchmarks.fidelity, but codes first: all but lossless, they show the noise of training."""
    yield "codes", "uint8", Codes()
    yield from (named for named in named_specs(num_classes) if named[0] != "codes")


def _peers(num_classes: int, temperatures: Sequence[float]) -> Iterator[tuple[Family, float | None]]:
    yield Family(lambda k: DistillKit(num_classes, k=k, leftover="zero"), 128, num_classes - 1), None
    yield Family(lambda draws: RandomSampling(num_classes, draws), 50, _MOST_DRAWS), None
    for temperature in temperatures:
        if temperature != 1:
            yield _sampling_at(num_classes, temperature), temperature


def _sampling_at(num_classes: int, temperature: float) -> Family:
    return Family(lambda draws: RandomSampling(num_classes, draws, stored_temperature=temperature), 50, _MOST_DRAWS)


def _encoded(contestant: Ours | Peer, logits: Float[Tensor, "row class"]) -> Kept:
    """Encode in blocks of rows; each block of random sampling draws with a seed of its own."""
    blocks = []
    for number, block in enumerate(logits.split(_BLOCK_ROWS)):
        one = replace(contestant, seed=number) if isinstance(contestant, RandomSampling) else contestant
        blocks.append(one.encode(block))
    return {name: _stacked([block[name] for block in blocks]) for name in blocks[0]}


def _stacked(blocks: Sequence[Tensor]) -> Tensor:
    """Put blocks of rows below each other; those with fewer columns are padded with 0."""
    if blocks[0].ndim == 1:
        return torch.cat(list(blocks))
    widest = max(block.shape[1] for block in blocks)
    return torch.cat([torch.nn.functional.pad(block, (0, widest - block.shape[1])) for block in blocks])
