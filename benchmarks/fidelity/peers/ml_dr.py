"""ml-dr's reinforced data: the top-k probabilities of many views of an example, one file an example.

As its sources describe it (apple/ml-dr, read in November 2026): a file holds an example's number and a list with one
entry a view, its augmentation parameters and two Python lists, probabilities and classes; `torch.save` writes it, and
a gzipped tar of all files is what is handed around. Here the parameters are left empty, which favours it. What the
kept probabilities leave of 1 is spread evenly ("smooth"); where rounding leaves less than nothing, its code falls back
to a softmax over the kept *probabilities* and zeros elsewhere. There is one temperature.

Nothing is ever unpickled here: the same numbers are written once more in a plain layout, which is read and not counted.
"""

from __future__ import annotations

__all__ = ["MlDr"]

import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.fidelity.peers.base import Kept, Peer, spread_leftover, tempered, top_classes

_PICKLE_PROTOCOL: Final = 4  # as it chose, for size


@dataclass(frozen=True)
class MlDr(Peer):
    """Lists of numbers in a file an example.

    Parameters
    ----------
    num_classes : int
        Classes of a row.
    k : int, default 10
        Probabilities kept.
    views_per_example : int, default 50
        Rows that share a file; it uses 50 to 8,000.
    """

    num_classes: int
    k: int = 10
    views_per_example: int = 50

    @property
    def name(self) -> str:
        """The repository's name."""
        return "ml-dr"

    @property
    def setting(self) -> str:
        """How many probabilities are kept."""
        return f"k={self.k}"

    @property
    def _record(self) -> np.dtype[np.void]:
        return np.dtype([("probabilities", "<f4", (self.k,)), ("classes", "<i8", (self.k,))])

    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Give float32 probabilities, which Python's floats hold, and classes."""
        values, classes = top_classes(logits.float().softmax(dim=1), self.k)
        return {"probabilities": values, "classes": classes}

    def write(self, kept: Kept, folder: Path) -> int:
        """Write the gzipped tar of its files, whose size is given, and the plain copy that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / "reinforced_data.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for example, content in enumerate(self._files(kept)):
                member = tarfile.TarInfo(f"reinforced_data/{example}.pth.tar")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
        plain = np.empty(len(kept["classes"]), dtype=self._record)
        plain["probabilities"], plain["classes"] = kept["probabilities"].numpy(), kept["classes"].numpy()
        plain.tofile(folder / "plain.bin")
        return archive.stat().st_size

    def load(self, folder: Path) -> Kept:
        """Read the plain copy."""
        plain = np.fromfile(folder / "plain.bin", dtype=self._record)
        return {name: torch.from_numpy(plain[name].copy()) for name in ("probabilities", "classes")}

    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Spread the leftover evenly; at another temperature than 1, power and normalise all."""
        values, classes = kept["probabilities"], kept["classes"]
        dense = spread_leftover(values, classes, self.num_classes)
        overfull = values.sum(dim=1) > 1
        fallback = torch.zeros(int(overfull.sum()), self.num_classes)
        dense[overfull] = fallback.scatter_(1, classes[overfull], values[overfull].softmax(dim=1))
        return tempered(dense, 1 / temperature)

    def _files(self, kept: Kept) -> list[bytes]:
        probabilities, classes = kept["probabilities"].tolist(), kept["classes"].tolist()
        views = [{"params": {}, "prob": pair} for pair in zip(probabilities, classes, strict=True)]
        files = []
        for example, start in enumerate(range(0, len(views), self.views_per_example)):
            buffer = BytesIO()
            entry = (example, views[start : start + self.views_per_example])
            torch.save(entry, buffer, pickle_protocol=_PICKLE_PROTOCOL)
            files.append(buffer.getvalue())
        return files
