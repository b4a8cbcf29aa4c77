"""The arms of students that read windows: what is kept of every row lies on the device, to be decoded by the batch."""

from __future__ import annotations

__all__ = ["BLOCK_ROWS", "FullRows", "KeptRows", "OurRows", "RowArm", "SparseRows", "open_row_arms", "soften"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from benchmarks.fidelity.lineup import Family, largest, named_specs
from benchmarks.fidelity.ours import Ours
from benchmarks.fidelity.peers import DistillKit, Kept, RandomSampling
from benchmarks.students.subjects import thinned
from benchmarks.students.windows import Windows, WindowSubject, now
from kdcache.codecs.head_logits import Head, HeadLogits
from kdcache.documents import Spectral

BLOCK_ROWS: Final = 4096
"""Rows encoded together, and so many in a shard of a cache."""

_BUDGET_SETTING: Final = "max_kl=0.02"  # other systems are given the bytes of this arm
_PILOT_ROWS: Final = 2304
_SIZING_ROWS: Final = 256
_MOST_DRAWS: Final = 2**14

Softener = Callable[[Tensor, Tensor, Tensor], None]


class KeptRows(Protocol):
    """A way to keep soft targets, of which some rows at a time become soft targets."""

    def soften_into(self, out: BFloat16[Tensor, "row class"], kept: Kept, temperature: float) -> None:
        """Overwrite `out` with the soft targets of rows."""
        ...


@dataclass(frozen=True, eq=False)
class RowArm:
    """Every row to learn from, kept in one way.

    Parameters
    ----------
    name, is_ours, row_bytes, temperature
        As of `benchmarks.students.arms.Arm`.
    way : KeptRows
    kept : mapping of str to Tensor
        Tensors [row, ...] on the device.
    encode_rows_per_second : float, optional
        How quickly the rows were encoded, where kdcache did it.
    """

    name: str
    is_ours: bool
    row_bytes: float
    temperature: float | None
    way: KeptRows
    kept: Kept
    encode_rows_per_second: float | None = None

    def soften_into(
        self, out: BFloat16[Tensor, "row class"], windows: Int[Tensor, " window"], temperature: float
    ) -> None:
        """Overwrite `out` with the soft targets of whole windows, one after the other."""
        length = len(out) // len(windows)
        picked = {name: _picked(values, windows, length) for name, values in self.kept.items()}
        self.way.soften_into(out, picked, temperature)


def soften(logits: Float[Tensor, "row class"], temperature: Tensor, out: BFloat16[Tensor, "row class"]) -> None:
    """Overwrite `out` with the softmax of logits over a temperature, a number on their device; made in float32."""
    out.copy_((logits / temperature).softmax(dim=1))


@dataclass(frozen=True, eq=False)
class FullRows:
    """Hidden states, of which full logits are made, in float32 or rounded.

    Parameters
    ----------
    head : Tensor [class, component]
        float32.
    softener : callable
        `soften`, compiled or not.
    dtype : torch.dtype
        To which the logits are rounded.
    """

    head: Float[Tensor, "class component"]
    softener: Softener
    dtype: torch.dtype = torch.float32

    def soften_into(self, out: BFloat16[Tensor, "row class"], kept: Kept, temperature: float) -> None:
        """Multiply and soften."""
        logits = kept["hidden"].float() @ self.head.T
        rounded = logits if self.dtype == torch.float32 else logits.to(self.dtype).float()
        self.softener(rounded, _on_device(temperature, rounded), out)


@dataclass(frozen=True, eq=False)
class OurRows:
    """Codes of a cache's codec.

    Parameters
    ----------
    ours : Ours
    softener : callable
        `soften`, compiled or not.
    """

    ours: Ours
    softener: Softener

    def soften_into(self, out: BFloat16[Tensor, "row class"], kept: Kept, temperature: float) -> None:
        """Decode and soften."""
        decoded = self.ours.decoded(kept, temperature)
        if self.ours.is_normalised:
            out.copy_(decoded.div_(temperature).exp_())
        else:
            self.softener(decoded, _on_device(temperature, decoded), out)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Some classes of each row, and logarithms of their weights at a temperature.

    Parameters
    ----------
    stored_temperature : float, optional
        At which weights are used as they are; elsewhere they are powered and made to sum to 1. None: made to, always.
    """

    stored_temperature: float | None = None

    def soften_into(self, out: BFloat16[Tensor, "row class"], kept: Kept, temperature: float) -> None:
        """Scatter weights, or their softmax where they must be powered."""
        weights = kept["log_weights"].float()
        if temperature == self.stored_temperature:
            weights = weights.exp_()
        else:
            weights = (weights * ((self.stored_temperature or 1.0) / temperature)).softmax(dim=1)
        out.zero_().scatter_add_(1, kept["classes"].long(), weights.to(out.dtype))


def open_row_arms(
    subject: WindowSubject, temperatures: Sequence[float], folder: Path, softener: Softener = soften
) -> Iterator[RowArm]:
    """Keep a teacher's rows in every way that takes fewer bytes than half of the logits; see `arms.open_arms`.

    Parameters
    ----------
    subject : WindowSubject
        Caches are built, on its device, of 2,304 of the rows to learn from, spread evenly.
    temperatures : sequence of float
    folder : Path
        Where caches are built and files written.
    softener : callable
        `soften`, compiled or not.

    Yields
    ------
    RowArm
        Full logits in float32 first, then rounded to bfloat16: what rounding does to a training run.
    """
    train, width = subject.train, 4.0 * subject.num_classes
    full = {"hidden": train.hidden}
    yield RowArm("full logits, float32", False, width, None, FullRows(subject.head, softener), full)
    rounded = FullRows(subject.head, softener, torch.bfloat16)
    yield RowArm("full logits, bfloat16", False, width / 2, None, rounded, full)
    pilot = subject.logits(train.hidden[thinned(torch.arange(train.num_rows), _PILOT_ROWS).to(subject.device)])
    budget = 0.0
    for number, (name, setting, spec) in enumerate(named_specs(subject.num_classes)):
        if name == "codes":
            continue
        ours = Ours(f"kdcache {name}", setting, spec, pilot, folder / f"cache-{number}", device=str(subject.device))
        row_bytes = ours.sizes({"codes": _codes(ours, subject, subject.held_out)}).row_bytes
        budget = row_bytes if setting == _BUDGET_SETTING else budget
        start = now(subject.device)
        kept = {"codes": _codes(ours, subject, train)}
        rate = train.num_rows / (now(subject.device) - start)
        yield RowArm(f"{ours.name}, {setting}", True, row_bytes, None, OurRows(ours, softener), kept, rate)
    yield from _peer_arms(subject, temperatures, budget, folder)


def _peer_arms(subject: WindowSubject, temperatures: Sequence[float], budget: float, folder: Path) -> Iterator[RowArm]:
    held_out = subject.held_out
    chosen = thinned(torch.arange(held_out.num_rows), _SIZING_ROWS).to(subject.device)
    sample = subject.logits(held_out.hidden[chosen]).cpu()
    size = _size(Family(lambda k: DistillKit(subject.num_classes, k=k, leftover="zero"), 128, subject.num_classes - 1),
                 budget, sample)  # fmt: skip
    kit = DistillKit(subject.num_classes, k=size, leftover="zero")
    row_bytes = _written(kit, subject, folder / "kit")
    yield RowArm(f"{kit.name}, {kit.setting}", False, row_bytes, None, SparseRows(), _kit_entries(kit, subject))
    for at in (1.0, *(one for one in temperatures if one != 1)):
        size = _size(Family(_sampler(subject.num_classes, at), 50, _MOST_DRAWS), budget, sample)
        sampling = RandomSampling(subject.num_classes, size, stored_temperature=at)
        row_bytes = _written(sampling, subject, folder / f"sampling-{at:g}")
        way, kept = SparseRows(at), _drawn(sampling, subject)
        yield RowArm(f"{sampling.name}, {sampling.setting}", False, row_bytes, None if at == 1 else at, way, kept)


def _sampler(num_classes: int, temperature: float) -> Callable[[int], RandomSampling]:
    return lambda draws: RandomSampling(num_classes, draws, stored_temperature=temperature)


def _size(family: Family, budget: float, sample: Float[Tensor, "row class"]) -> int:
    size = largest(family, budget, sample)
    if size == 0:
        raise ValueError(f"{family.make(1).name} keeps nothing of {len(sample)} rows in {budget:.0f} bytes each")
    return size


def _written(peer: DistillKit | RandomSampling, subject: WindowSubject, folder: Path) -> float:
    """Give the bytes a row of the rows held out, in the system's own container."""
    blocks = [peer.encode(block) for block in _blocks(subject, subject.held_out)]
    kept = {name: _joined([block[name].cpu() for block in blocks]) for name in blocks[0]}
    return peer.write(kept, folder) / subject.held_out.num_rows


def _codes(ours: Ours, subject: WindowSubject, windows: Windows) -> Tensor:
    """Encode: from hidden states where the codec takes them, else from logits made of them."""
    if not isinstance(ours.decoder.codec.spec, Spectral):
        return _joined([ours.encode(block)["codes"] for block in _blocks(subject, windows)])
    decoder, head = ours.decoder.to(subject.device), Head(subject.head)
    blocks = windows.hidden.split(BLOCK_ROWS)
    return _joined([decoder.encode_measured(HeadLogits(block.float(), head))[0] for block in blocks])


def _blocks(subject: WindowSubject, windows: Windows) -> Iterator[Float[Tensor, "row class"]]:
    return (subject.logits(block) for block in windows.hidden.split(BLOCK_ROWS))


def _kit_entries(kit: DistillKit, subject: WindowSubject) -> Kept:
    found = [kit.entries(block) for block in _blocks(subject, subject.train)]
    log_weights, classes = (torch.cat([one[part] for one in found]).to(subject.device) for part in (0, 1))
    return {"log_weights": log_weights, "classes": classes.int()}


def _drawn(sampling: RandomSampling, subject: WindowSubject) -> Kept:
    """Draw, each block with a seed of its own; a place that no class came to has weight 0."""
    found = []
    for number, block in enumerate(_blocks(subject, subject.train)):
        drawn = replace(sampling, seed=number).encode(block)
        found.append({name: drawn[name].int() for name in ("classes", "counts")})
    classes, counts = (_joined([one[name] for one in found]) for name in ("classes", "counts"))
    return {"classes": classes, "log_weights": (counts / sampling.num_draws).log_()}


def _on_device(temperature: float, beside: Tensor) -> Float[Tensor, ""]:
    """Give a number on a device without waiting for it, which a copy would."""
    return torch.full((), temperature, device=beside.device)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """Put blocks of rows below each other; those with fewer columns are padded with 0."""
    if blocks[0].ndim == 1:
        return torch.cat(list(blocks))
    widest = max(block.shape[1] for block in blocks)
    joined = torch.zeros(sum(map(len, blocks)), widest, dtype=blocks[0].dtype, device=blocks[0].device)
    start = 0
    for block in blocks:
        joined[start : start + len(block), : block.shape[1]] = block
        start += len(block)
    return joined


def _picked(values: Tensor, windows: Int[Tensor, " window"], length: int) -> Tensor:
    """Gather the rows of windows; torch gathers no uint16."""
    whole = values.view(torch.int16) if values.dtype == torch.uint16 else values
    return whole.view(-1, length, *values.shape[1:])[windows].flatten(0, 1).view(values.dtype)
