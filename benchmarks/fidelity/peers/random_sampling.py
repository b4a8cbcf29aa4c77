"""Random-sampling distillation: classes drawn from the teacher, and how often each came.

Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL 2025, arXiv 2503.16870); its
code is not published. `num_draws` classes are drawn with replacement from a proposal proportional to p^proposal_power,
p the soft targets at the stored temperature; a class weighs count * p / proposal / num_draws, so that the expectation
of every class's weight is its probability. At power 1, its default, the weight is count / num_draws, and a class takes
17 + 7 bits: about a dozen classes, 36 bytes, come of 50 draws from a language model.

The expectation is right at the stored temperature alone. At another one the weights are powered and normalised, the
only reading there is, and biased: rare classes that were drawn come out too heavy by far, and those not drawn missing.
"""

from __future__ import annotations

__all__ = ["RandomSampling"]

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.fidelity.peers.base import Kept, Peer, bytes_of, tempered


@dataclass(frozen=True)
class RandomSampling(Peer):
    """Drawn classes with counts, as many whole bytes a class as id and count need, after one or two of how many.

    Parameters
    ----------
    num_classes : int
        Classes of a row.
    num_draws : int, default 50
        Draws a row.
    proposal_power : float, default 1
        Power of the proposal; another one than 1 stores a float16 ratio p / proposal for each class as well.
    stored_temperature : float, default 1
        Temperature of the soft targets that are sampled.
    seed : int, default 0
        Of the draws.
    """

    num_classes: int
    num_draws: int = 50
    proposal_power: float = 1.0
    stored_temperature: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Random sampling, and the temperature it was drawn at."""
        return f"random sampling at T={self.stored_temperature:g}"

    @property
    def setting(self) -> str:
        """Draws."""
        return f"{self.num_draws} draws"

    @property
    def entry_bytes(self) -> int:
        """Bytes of a drawn class: its number and its count packed, rounded up, and the ratio where there is one."""
        count_bits = self.num_draws.bit_length()
        packed = ((self.num_classes - 1).bit_length() + count_bits + 7) // 8
        return packed + (2 if self.proposal_power != 1 else 0)

    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Draw; give classes and counts, padded with count 0 to the most classes a row drew, and the ratios."""
        targets = (logits.float() / self.stored_temperature).softmax(dim=1)
        proposal = tempered(targets, self.proposal_power)
        generator = torch.Generator(logits.device).manual_seed(self.seed)
        draws = proposal.multinomial(self.num_draws, replacement=True, generator=generator).sort(dim=1).values
        classes, counts = _counted(draws)
        ratios = (targets.gather(1, classes) / proposal.gather(1, classes)).half()
        return {"classes": classes, "counts": counts, "ratios": ratios}

    def write(self, kept: Kept, folder: Path) -> int:
        """Write how many classes each row has, and the entries one after the other."""
        folder.mkdir(parents=True, exist_ok=True)
        present = kept["counts"] > 0
        present.sum(dim=1).numpy().astype(self._length).tofile(folder / "lengths.bin")
        count_bits = self.num_draws.bit_length()
        entries = (kept["classes"] << count_bits | kept["counts"])[present].numpy().astype("<u8")
        num_bytes = self.entry_bytes - (2 if self.proposal_power != 1 else 0)
        entries.view(np.uint8).reshape(-1, 8)[:, :num_bytes].tofile(folder / "entries.bin")
        if self.proposal_power != 1:
            kept["ratios"][present].numpy().tofile(folder / "ratios.bin")
        return bytes_of(folder)

    def load(self, folder: Path) -> Kept:
        """Read the entries back, padded as `encode` pads them."""
        lengths = torch.from_numpy(np.fromfile(folder / "lengths.bin", dtype=self._length).astype(np.int64))
        num_bytes = self.entry_bytes - (2 if self.proposal_power != 1 else 0)
        raw = np.fromfile(folder / "entries.bin", dtype=np.uint8).reshape(-1, num_bytes)
        entries = torch.from_numpy(np.pad(raw, ((0, 0), (0, 8 - num_bytes))).view("<i8")[:, 0])
        count_bits = self.num_draws.bit_length()
        present = torch.arange(int(lengths.max())) < lengths[:, None]
        classes, counts = (torch.zeros(present.shape, dtype=torch.int64) for _ in range(2))
        classes[present], counts[present] = entries >> count_bits, entries & (2**count_bits - 1)
        ratios = torch.ones(present.shape, dtype=torch.float16)
        if self.proposal_power != 1:
            ratios[present] = torch.from_numpy(np.fromfile(folder / "ratios.bin", dtype=np.float16))
        return {"classes": classes, "counts": counts, "ratios": ratios}

    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Give the weights as they are at the stored temperature; elsewhere powered and normalised."""
        weights = kept["counts"].float() / self.num_draws
        if self.proposal_power != 1:
            weights = weights * kept["ratios"].float()
        weights = tempered(weights, self.stored_temperature / temperature)
        return weights.new_zeros(len(weights), self.num_classes).scatter_add_(1, kept["classes"], weights)

    @property
    def _length(self) -> str:
        return "u1" if self.num_draws < 256 else "<u2"


def _counted(draws: Int[Tensor, "row draw"]) -> tuple[Int[Tensor, "row drawn"], Int[Tensor, "row drawn"]]:
    """Give the different classes of sorted draws and their counts; rows are padded with class 0 and count 0."""
    starts = torch.ones_like(draws, dtype=torch.bool)
    starts[:, 1:] = draws[:, 1:] != draws[:, :-1]
    place = starts.cumsum(dim=1) - 1
    num_drawn = int(place.max()) + 1
    classes, counts = (draws.new_zeros(len(draws), num_drawn) for _ in range(2))
    return classes.scatter_(1, place, draws), counts.scatter_add_(1, place, torch.ones_like(draws))
