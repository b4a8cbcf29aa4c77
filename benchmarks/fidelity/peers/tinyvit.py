"""TinyViT's saved logits: the top-k probabilities of a view in a record of fixed size.

As its sources describe it (microsoft/Cream, TinyViT, MIT, read in November 2026): for each view a file of records with
the augmentation's seed (4 bytes), `k` class numbers (2 bytes) and `k` float16 probabilities, and a text file with the
key of each record. What the kept probabilities leave of 1 is spread evenly over the other classes. There is one
temperature; at another one these targets can only be powered and normalised, even part and all.
"""

from __future__ import annotations

__all__ = ["TinyViT"]

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.fidelity.peers.base import Kept, Peer, bytes_of, spread_leftover, tempered, top_classes
from kdcache.errors import CodecError

_MOST_CLASSES: Final = 2**16


@dataclass(frozen=True)
class TinyViT(Peer):
    """Records of `4 k + 4` bytes.

    Class numbers are read as unsigned here, which the original, with at most 21,841 classes, had no need of.

    Parameters
    ----------
    num_classes : int
        Classes of a row, at most 65,536.
    k : int, default 100
        Probabilities kept.

    Raises
    ------
    CodecError
        Two bytes cannot number the classes.
    """

    num_classes: int
    k: int = 100

    def __post_init__(self) -> None:
        if self.num_classes > _MOST_CLASSES:
            raise CodecError(f"TinyViT numbers classes with two bytes; it cannot keep {self.num_classes}.")

    @property
    def name(self) -> str:
        """TinyViT."""
        return "TinyViT"

    @property
    def setting(self) -> str:
        """How many probabilities are kept."""
        return f"k={self.k}"

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self._record.itemsize

    @property
    def _record(self) -> np.dtype[np.void]:
        return np.dtype([("seed", "<i4"), ("classes", "<u2", (self.k,)), ("probabilities", "<f2", (self.k,))])

    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Give seeds, classes and float16 probabilities."""
        values, classes = top_classes(logits.float().softmax(dim=1), self.k)
        seeds = torch.randint(2**31, (len(logits),), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        return {"seeds": seeds, "classes": classes, "probabilities": values.half()}

    def write(self, kept: Kept, folder: Path) -> int:
        """Write the records and their keys; a key is the number of the row, the shortest it uses."""
        folder.mkdir(parents=True, exist_ok=True)
        records = np.empty(len(kept["seeds"]), dtype=self._record)
        records["seed"] = kept["seeds"].numpy()
        records["classes"] = kept["classes"].numpy()
        records["probabilities"] = kept["probabilities"].numpy()
        records.tofile(folder / "rank0-values.bin")
        (folder / "rank0-keys.txt").write_text("".join(f"{row}\n" for row in range(len(records))))
        return bytes_of(folder)

    def load(self, folder: Path) -> Kept:
        """Read the records."""
        records = np.fromfile(folder / "rank0-values.bin", dtype=self._record)
        return {
            "seeds": torch.from_numpy(records["seed"].copy()),
            "classes": torch.from_numpy(records["classes"].astype(np.int64)),
            "probabilities": torch.from_numpy(records["probabilities"].copy()),
        }

    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Spread the leftover evenly; at another temperature than 1, power and normalise all."""
        dense = spread_leftover(kept["probabilities"].float(), kept["classes"], self.num_classes)
        return tempered(dense, 1 / temperature)
