"""Who takes part: our codecs at a few rates, and other systems as they come and at our bytes."""

from __future__ import annotations

__all__ = ["Entry", "Family", "largest", "named_specs", "our_entries", "peer_entries"]

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.fidelity.measures import Contestant
from benchmarks.fidelity.ours import Ours, Sizes
from benchmarks.fidelity.peers import DistillKit, Kept, MlDr, Peer, RandomSampling, TinyViT
from benchmarks.fidelity.subjects import Subject
from kdcache import documents
from kdcache.documents import CodecSpec

_MOST_CLASSES_OF_CODES: Final = 5000  # a code a class: no rival where classes are many
_MOST_DRAWS: Final = 2**14
_SIZING_ROWS: Final = 256
_MAX_KL: Final = (0.005, 0.02, 0.08)


@dataclass(frozen=True, eq=False)
class Entry:
    """A contestant with the rows held out in its hands.

    Parameters
    ----------
    family : str
        Entries of one family differ in their size alone.
    contestant : Contestant
    kept : Kept
        What it keeps of the rows held out.
    sizes : Sizes
    is_default : bool
        Whether the size is the one its authors recommend, or for ours, one a user would write.
    """

    family: str
    contestant: Contestant
    kept: Kept
    sizes: Sizes
    is_default: bool

    @property
    def is_ours(self) -> bool:
        """Whether kdcache keeps it."""
        return isinstance(self.contestant, Ours)


def our_entries(subject: Subject, folder: Path) -> list[Entry]:
    """Build a cache for each of our settings, and encode the rows held out."""
    entries = []
    for number, (name, setting, spec) in enumerate(named_specs(subject.num_classes)):
        ours = Ours(name, setting, spec, subject.pilot, folder / f"cache-{number}")
        kept = ours.encode(subject.held_out)
        entries.append(Entry(f"kdcache {name}", ours, kept, ours.sizes(kept), is_default=True))
    return entries


def peer_entries(subject: Subject, budgets: Sequence[float], folder: Path) -> list[Entry]:
    """Give other systems the rows held out: once at the size they recommend, and once for each budget.

    Parameters
    ----------
    subject : Subject
    budgets : sequence of float
        Bytes a row; a system gets the largest size whose files stay within them, measured on rows of the pilot.
    folder : Path
        Where their files are written.
    """
    entries = []
    for number, family in enumerate(_families(subject.num_classes)):
        sample = subject.pilot[torch.linspace(0, len(subject.pilot) - 1, _SIZING_ROWS).long()]
        asked = budgets if family.is_main else budgets[len(budgets) // 2 :][:1]
        sizes = [family.default] + [largest(family, budget, sample) for budget in asked]
        for place, size in enumerate(dict.fromkeys(size for size in sizes if size)):
            peer = family.make(size)
            kept = peer.encode(subject.held_out)
            num_bytes = peer.write(kept, folder / f"peer-{number}-{place}")
            row_bytes = Sizes(num_bytes / len(subject.held_out))
            entries.append(Entry(peer.name, peer, kept, row_bytes, is_default=size == family.default))
    return entries


@dataclass(frozen=True)
class Family:
    """A system, up to the number that sets its size; one that is not a main one meets the middle budget only."""

    make: Callable[[int], Peer]
    default: int
    most: int
    is_main: bool = True


def named_specs(num_classes: int) -> Iterator[tuple[str, str, CodecSpec]]:
    """Give our settings as name, setting and spec."""
    for max_kl in _MAX_KL if hasattr(documents, "Spectral") else ():
        yield "spectral", f"max_kl={max_kl:g}", documents.Spectral(max_kl=max_kl)
    if hasattr(documents, "TopK"):
        yield "topk, class means", "k=16", documents.TopK(k=16)
        yield "topk, samples", "k=16", documents.TopK(k=16, tail="samples")
    if num_classes <= _MOST_CLASSES_OF_CODES:
        yield "codes", "uint8", documents.Codes()


def _families(num_classes: int) -> list[Family]:
    most = num_classes - 1
    return [
        Family(lambda k: DistillKit(num_classes, k=k), 128, most),
        Family(lambda k: DistillKit(num_classes, k=k, leftover="zero"), 128, most, is_main=False),
        Family(lambda k: TinyViT(num_classes, k=k), 100, most),
        Family(lambda k: MlDr(num_classes, k=k), 10, most),
        Family(lambda draws: RandomSampling(num_classes, draws), 50, _MOST_DRAWS),
        Family(
            lambda draws: RandomSampling(num_classes, draws, stored_temperature=2.0), 50, _MOST_DRAWS, is_main=False
        ),
    ]


def largest(family: Family, budget: float, sample: Float[Tensor, "row class"]) -> int:
    """Give the largest size whose files stay within `budget` bytes a row of a sample; 0 where none does."""
    low, high = 0, 1
    while high < family.most and _row_bytes(family.make(high), sample) <= budget:
        low, high = high, min(2 * high, family.most)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if _row_bytes(family.make(middle), sample) <= budget else (low, middle)
    return low


def _row_bytes(peer: Peer, sample: Float[Tensor, "row class"]) -> float:
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        return peer.store(sample, Path(folder)) / len(sample)
