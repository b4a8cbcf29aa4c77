"""What every reimplemented format offers, and the arithmetic that several of them share."""

from __future__ import annotations

__all__ = ["Kept", "Peer", "bytes_of", "spread_leftover", "tempered", "top_classes"]

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float, Float64, Int
from torch import Tensor

from kdcache.errors import CodecError

Kept = Mapping[str, Tensor]
"""What a format keeps of some rows, in its stored precision: named tensors whose first axis is the row."""


class Peer(ABC):
    """A format in which another system keeps a teacher's soft targets."""

    num_classes: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The system, and how its targets are read where there is a choice."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """The parameter that sets the size, as a reader of a table wants it."""

    @abstractmethod
    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Give what the format keeps of these rows."""

    @abstractmethod
    def write(self, kept: Kept, folder: Path) -> int:
        """Write the rows in the system's own container and give the bytes of all files a reader needs."""

    @abstractmethod
    def load(self, folder: Path) -> Kept:
        """Give the rows that `write` wrote."""

    @abstractmethod
    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Form the soft targets at a temperature as the system's training code does, float32."""

    def log_soft_targets(self, kept: Kept, temperature: float) -> Float64[Tensor, "row class"]:
        """Give the logarithms of the soft targets, float64; -inf where a class has none, or less than none."""
        return self.soft_targets(kept, temperature).double().clamp(min=0).log()

    def store(self, logits: Float[Tensor, "row class"], folder: Path) -> int:
        """Encode and write rows; give the bytes on disk, container and metadata included."""
        return self.write(self.encode(logits), folder)

    def read(self, source: Path | Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Read soft targets from a folder, or from what `encode` gave."""
        return self.soft_targets(self.load(source) if isinstance(source, Path) else source, temperature)


def top_classes(
    values: Float[Tensor, "row class"], k: int
) -> tuple[Float[Tensor, "row kept"], Int[Tensor, "row kept"]]:
    """Give the `k` largest values of each row, largest first, and their classes.

    Raises
    ------
    CodecError
        There are fewer than `k` classes.
    """
    if k > values.shape[1]:
        raise CodecError(f"A row of {values.shape[1]} classes has no {k} largest; choose a smaller k.")
    top = values.topk(k, dim=1)
    return top.values, top.indices


def spread_leftover(
    kept: Float[Tensor, "row kept"], classes: Int[Tensor, "row kept"], num_classes: int, *, floor: float | None = None
) -> Float[Tensor, "row class"]:
    """Give kept probabilities their classes, and every other class an equal part of what is left of 1.

    Parameters
    ----------
    kept : Tensor [row, kept]
        Probabilities.
    classes : Tensor [row, kept]
        Their classes, int64.
    num_classes : int
        Classes of a row.
    floor : float, optional
        Least probability of a class that is not kept. Without it rounding can leave a negative one.
    """
    share = (1 - kept.sum(dim=1, keepdim=True)) / max(1, num_classes - kept.shape[1])
    if floor is not None:
        share = share.clamp(min=floor)
    return share.repeat(1, num_classes).scatter_(1, classes, kept)


def tempered(probabilities: Float[Tensor, "row class"], power: float) -> Float[Tensor, "row class"]:
    """Raise probabilities to a power and normalise them: another temperature, for want of logits.

    Negative ones, which rounding can leave, count as 0. At power 1 the probabilities are given as they are.
    """
    if power == 1:
        return probabilities
    powered = probabilities.clamp(min=0).pow(power)
    return powered / powered.sum(dim=1, keepdim=True)


def bytes_of(folder: Path) -> int:
    """Sum the sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
