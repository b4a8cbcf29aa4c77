"""How far stored soft targets are from a teacher's: divergences and distances, row by row, at every temperature.

KL is KL(teacher || stored) in nats. Where a format leaves a class of positive probability at 0, KL is infinite; such
rows are counted, and their KL is taken after every probability below 1e-8 has been raised to that and the row
normalised again. L1, the sum of absolute differences, is taken of what is stored as it is.
"""

from __future__ import annotations

__all__ = ["FLOOR", "TEMPERATURES", "Contestant", "Fidelity", "Tally", "compare"]

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Protocol

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from benchmarks.fidelity.peers import Kept

TEMPERATURES: Final = (1.0, 1.5, 2.0, 4.0, 10.0, 20.0)
FLOOR: Final = 1e-8
"""Least probability when KL would be infinite: the one that DistillKit gives to classes it did not keep."""

_BLOCK_ELEMENTS: Final = 2**18
_NUM_HEAD_CLASSES: Final = 128


class Contestant(Protocol):
    """A way to keep soft targets, whose rows are in memory."""

    @property
    def name(self) -> str:
        """The way."""

    @property
    def setting(self) -> str:
        """How it was set."""

    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Give what is kept of rows."""

    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Give the soft targets that a student would see, float32."""

    def log_soft_targets(self, kept: Kept, temperature: float) -> Float64[Tensor, "row class"]:
        """Give their logarithms, -inf where a class has none."""


@dataclass(frozen=True)
class Fidelity:
    """Figures of one contestant at one temperature, over the rows held out.

    Parameters
    ----------
    temperature : float
    kl_mean, kl_p99, kl_max : float
        KL(teacher || stored), nats.
    infinite_rows : float
        Share of rows where KL is infinite before the floor.
    head_kl_mean : float
        KL between coarse distributions: the teacher's 128 most probable classes one by one, all others as one class.
    l1_mean, l1_max : float
        Sum of absolute differences, 0 to 2 where both sum to 1.
    bias_l1 : float
        L1 between the means over rows of what is stored and of the teacher's, in classes binned by their rank in the
        teacher's row (1, 2 to 4, 5 to 16, 17 to 64, ...): misplaced probability that averaging does not take away.
    """

    temperature: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    infinite_rows: float
    head_kl_mean: float
    l1_mean: float
    l1_max: float
    bias_l1: float


@dataclass
class Tally:
    """Gathers one contestant's rows at one temperature, block by block."""

    kl: list[Tensor] = field(default_factory=list)
    head_kl: list[Tensor] = field(default_factory=list)
    l1: list[Tensor] = field(default_factory=list)
    infinite: list[Tensor] = field(default_factory=list)
    difference: Tensor | float = 0.0

    def add(self, truth: _Truth, log_stored: Float64[Tensor, "row class"]) -> None:
        """Add a block of rows."""
        stored = log_stored.exp()
        difference = stored - truth.probabilities
        self.l1.append(difference.abs().sum(dim=1))
        self.difference = self.difference + _by_rank(difference.gather(1, truth.order)).sum(dim=0)
        infinite = ((stored <= 0) & (truth.probabilities > 0)).any(dim=1)
        self.infinite.append(infinite.double())
        if bool(infinite.any()):
            log_stored = log_stored.clone()
            log_stored[infinite] = _floored(stored[infinite])
        self.kl.append((truth.probabilities * (truth.logs - log_stored).nan_to_num(nan=0)).sum(dim=1))
        self.head_kl.append(_head_divergence(truth, log_stored))

    def fidelity(self, temperature: float) -> Fidelity:
        """Give the figures."""
        kl, head_kl, l1, infinite = (torch.cat(one) for one in (self.kl, self.head_kl, self.l1, self.infinite))
        return Fidelity(
            temperature=temperature,
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            infinite_rows=float(infinite.mean()),
            head_kl_mean=float(head_kl.mean()),
            l1_mean=float(l1.mean()),
            l1_max=float(l1.max()),
            bias_l1=float((torch.as_tensor(self.difference) / len(kl)).abs().sum()),
        )


@dataclass(frozen=True)
class _Truth:
    """A teacher's soft targets of a block of rows."""

    logs: Float64[Tensor, "row class"]
    probabilities: Float64[Tensor, "row class"]
    order: Int[Tensor, "row rank"]

    @classmethod
    def of(cls, logits: Float64[Tensor, "row class"], temperature: float, order: Int[Tensor, "row rank"]) -> _Truth:
        logs = (logits / temperature).log_softmax(dim=1)
        return cls(logs, logs.exp(), order)

    @property
    def head(self) -> Int[Tensor, "row rank"]:
        return self.order[:, : min(_NUM_HEAD_CLASSES, self.order.shape[1] // 2)]


def compare(
    contestants: Sequence[Contestant],
    logits: Float[Tensor, "row class"],
    kept: Sequence[Kept],
    temperatures: Iterable[float] = TEMPERATURES,
) -> list[list[Fidelity]]:
    """Measure every contestant at every temperature, in float64 and in blocks of rows.

    Parameters
    ----------
    contestants : sequence of Contestant
    logits : Tensor [row, class]
        The teacher's, of rows held out.
    kept : sequence of Kept
        What each contestant keeps of these rows.
    temperatures : iterable of float

    Returns
    -------
    list [contestant] of list [temperature] of Fidelity
    """
    ladder = tuple(temperatures)
    tallies = [[Tally() for _ in ladder] for _ in contestants]
    for rows in _blocks(*logits.shape):
        wide = logits[rows].double()
        order = wide.argsort(dim=1, descending=True)
        for place, temperature in enumerate(ladder):
            truth = _Truth.of(wide, temperature, order)
            for contestant, own, tally in zip(contestants, kept, tallies, strict=True):
                block = {name: values[rows] for name, values in own.items()}
                tally[place].add(truth, contestant.log_soft_targets(block, temperature))
    return [[one.fidelity(at) for one, at in zip(tally, ladder, strict=True)] for tally in tallies]


def _floored(probabilities: Float64[Tensor, "row class"]) -> Float64[Tensor, "row class"]:
    raised = probabilities.clamp(min=FLOOR)
    return (raised / raised.sum(dim=1, keepdim=True)).log()


def _head_divergence(truth: _Truth, log_stored: Float64[Tensor, "row class"]) -> Float64[Tensor, " row"]:
    probabilities, logs, stored = (
        values.gather(1, truth.head) for values in (truth.probabilities, truth.logs, log_stored)
    )
    rest = (1 - probabilities.sum(dim=1)).clamp(min=1e-15)
    stored_rest = (1 - stored.exp().sum(dim=1)).clamp(min=1e-15)
    return (probabilities * (logs - stored)).sum(dim=1) + rest * (rest / stored_rest).log()


def _by_rank(ranked: Float64[Tensor, "row rank"]) -> Float64[Tensor, "row bin"]:
    """Sum over bins of ranks, each reaching four times as far as the one before."""
    edges = [0, 1]
    while edges[-1] < ranked.shape[1]:
        edges.append(4 * edges[-1])
    return torch.stack([ranked[:, low:high].sum(dim=1) for low, high in pairwise(edges)], dim=1)


def _blocks(num_rows: int, num_classes: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // num_classes)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
