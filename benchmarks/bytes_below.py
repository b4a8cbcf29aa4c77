"""What else would make the spectral codec's rows smaller: other compression of the same codes, other ways to round.

Compression is measured on the codes that the guard gave held-out rows. Ways to round are compared at equal mean KL,
that which the guard left: each is measured with two steps and its bytes are read off the line between; of every
second row, so that they stand beside "plain rounding". Rows of a mixture are bytes of entropy, beside the entropy of
what is stored now.
"""

from __future__ import annotations

__all__ = ["run"]

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from numcodecs import blosc
from torch import Tensor

from benchmarks import trellis
from benchmarks.mixtures import entropy_of, fitted_means, nearest
from benchmarks.targets import TARGETS
from benchmarks.teachers import load
from benchmarks.teachers.recorded import Recorded
from benchmarks.timing import interleaved
from kdcache.codecs import SpectralCodec, parameters_to
from kdcache.codecs.head_logits import Head, HeadLogits, Logits
from kdcache.codecs.spectral.guard import LEVELS_PER_OCTAVE
from kdcache.codecs.spectral.rows import MadeRows, all_rows
from kdcache.documents import Spectral

_NUM_HELD_OUT: Final = 2048
_NUM_PILOT_ROWS: Final = 2304
_CHUNK_ROWS: Final = 256
_CONTAINER_BYTES: Final = 4 + 16  # of a chunk: its checksum and its place in the index
_WIDER: Final = 1.04
_BEFORE: Final = "zstd 5, 64 KiB"
_NOW: Final = "zstd 8, 128 KiB"

Array = npt.NDArray[Any]
Rounded = tuple[Array, Array]  # integers that are stored, and the values in steps that they mean
_SHUFFLES: Final = {"none": blosc.NOSHUFFLE, "bytes": blosc.SHUFFLE, "bits": blosc.BITSHUFFLE}
_CHAINS: Final = {
    "zstd 5, 64 KiB": (5, "bits", 64),
    "zstd 5, 128 KiB": (5, "bits", 128),
    "zstd 5, whole chunk": (5, "bits", 512),
    "zstd 8, 64 KiB": (8, "bits", 64),
    "zstd 8, 128 KiB": (8, "bits", 128),
    "zstd 8, whole chunk": (8, "bits", 512),
    "zstd 9, 128 KiB": (9, "bits", 128),
    "zstd 5, bytes, 32 components": (5, "bytes", 16),
    "zstd 8, bytes, 32 components": (8, "bytes", 16),
}
_NUMBERS: Final[Mapping[str, Callable[[Array], Array]]] = {
    "Gray code of the zigzag": lambda q: _zigzag(q) ^ (_zigzag(q) >> 1),
    "Gray code from -4,096 on": lambda q: (q + 4096) ^ ((q + 4096) >> 1),
    "two's complement": lambda q: q,
    "sign after magnitude": lambda q: np.abs(q) << 1 | (q < 0),
}
_CENTROIDS: Final = (16, 64, 256)


@dataclass(frozen=True, eq=False)
class _Coded:
    """Held-out rows as they are stored now; coordinates, also the pilot's, are in units of the fitted step."""

    codes: Array
    coordinates: Array
    pilot: Array
    rows: MadeRows
    steps: Tensor
    max_kl: float

    @property
    def levels(self) -> Array:
        """Of the rows, int64 [row, 1]."""
        return self.codes[:, -1:].astype(np.int64)

    def thinned(self) -> _Coded:
        """Give every second row."""
        rows = MadeRows(self.rows.logits[::2], self.rows.parameters, self.rows.smallest)
        return _Coded(self.codes[::2], self.coordinates[::2], self.pilot, rows, self.steps, self.max_kl)

    def in_steps(self, levels: Array) -> Array:
        """Give coordinates in each row's own step."""
        in_steps: Array = self.coordinates * 2.0 ** ((levels - SpectralCodec.base_level) / LEVELS_PER_OCTAVE)
        return in_steps

    def kl(self, values: Array, levels: Array) -> Array:
        """Measure KL [row, temperature] of values in steps."""
        errors = self.rows.errors(all_rows(self.rows), torch.from_numpy(values), self.steps[torch.from_numpy(levels)])
        kl: Array = errors.kl.numpy()
        return kl


def run() -> list[dict[str, Any]]:
    """Try everything on every teacher; the rates of decoding are those of SmolLM2."""
    return _table({name: _tried(_coded(name)) for name in TARGETS})


def _table(found: Mapping[str, Mapping[str, dict[str, float]]]) -> list[dict[str, Any]]:
    first = next(iter(found.values()))
    return [
        {
            "what": what,
            **{name: tried[what]["bytes"] for name, tried in found.items()},
            **{key: first[what].get(key) for key in ("encode_microseconds_a_row", "decode_rows_a_second", "outwards")},
        }
        for what in first
    ]


def _coded(name: str) -> _Coded:
    main = load(name)
    pilot_rows, held_out = main.split(num_held_out=_NUM_HELD_OUT, seed=0)
    pilot_rows = pilot_rows[torch.linspace(0, len(pilot_rows) - 1, min(_NUM_PILOT_ROWS, len(pilot_rows))).long()]
    pilot, rows = _given(main, pilot_rows), _given(main, held_out)
    codec, parameters = SpectralCodec.fitted(Spectral(max_kl=TARGETS[name][0]), main.num_classes, pilot)
    prepared = codec.prepare_to_encode(parameters_to(parameters, "cpu"))
    step = float(prepared["steps"][codec.base_level])
    return _Coded(
        codes=codec.encode(rows, prepared).numpy(),
        coordinates=MadeRows(rows, prepared, 1.0).coordinates().numpy() / step,
        pilot=MadeRows(pilot, prepared, 1.0).coordinates().numpy() / step,
        rows=MadeRows(rows, prepared, 1.0),
        steps=prepared["steps"],
        max_kl=TARGETS[name][0],
    )


def _given(recorded: Recorded, rows: Tensor) -> Logits:
    if recorded.name != "smollm2" or recorded.hidden is None or recorded.head is None:
        return recorded.logits(rows)
    return HeadLogits(recorded.hidden[rows], Head(recorded.head.weight, recorded.head.bias))


def _tried(coded: _Coded) -> dict[str, dict[str, float]]:
    numbers = _unzigzag(coded.codes[:, :-1])
    found = {what: _compressed(coded.codes, *chain) for what, chain in _CHAINS.items()}
    for what, mapped in _NUMBERS.items():
        found[f"{what}, zstd 5"] = _compressed(
            np.concatenate([mapped(numbers), coded.levels], axis=1).astype(np.uint16), *_CHAINS[_BEFORE]
        )
    narrow = np.minimum(coded.codes, 255).astype(np.uint8)  # escapes are left out: they would add to it
    found["uint8, bytes, 48 components, zstd 7"] = _compressed(narrow, 7, "none", 12)
    found["rows of a chunk by energy, zstd 8"] = _by_energy(coded, numbers)
    found["entropy of the components"] = {"bytes": entropy_of(numbers)}
    found |= {f"entropy, {count} means": {"bytes": _mixture(coded, count)} for count in _CENTROIDS}
    return found | _rounded(coded.thinned())


def _compressed(codes: Array, level: int, shuffle: str, kib: int) -> dict[str, float]:
    """Compress column after column: bytes a row with checksums and index, and processor time."""
    starts = range(0, len(codes), _CHUNK_ROWS)
    chunks = [np.ascontiguousarray(codes[start : start + _CHUNK_ROWS].T) for start in starts]
    blosc.use_threads = False
    began = time.process_time()
    made = [blosc.compress(c, b"zstd", level, _SHUFFLES[shuffle], kib * 1024, c.itemsize) for c in chunks]
    seconds = time.process_time() - began
    timing = interleaved({"": lambda: [blosc.decompress(piece) for piece in made]}, rounds=3, clock=time.process_time)
    return {
        "bytes": (sum(map(len, made)) + _CONTAINER_BYTES * len(made) + 4) / len(codes),
        "encode_microseconds_a_row": 1e6 * seconds / len(codes),
        "decode_rows_a_second": len(codes) / timing[""].median,
    }


def _by_energy(coded: _Coded, numbers: Array) -> dict[str, float]:
    """Sort each chunk's rows by their energy; which row is where then takes a byte a row."""
    energy = ((numbers / (numbers.std(axis=0) + 0.3)) ** 2).mean(axis=1)
    starts = range(0, len(numbers), _CHUNK_ROWS)
    order = np.concatenate([start + energy[start : start + _CHUNK_ROWS].argsort(kind="stable") for start in starts])
    found = _compressed(coded.codes[order], *_CHAINS[_NOW])
    return {"bytes": found["bytes"] + 1}


def _mixture(coded: _Coded, count: int) -> float:
    """Give the entropy of what is left beside means that were fitted to the pilot, and of the means' numbers."""
    means = fitted_means(coded.pilot, count)
    labels = nearest(coded.coordinates, means)
    residual = replace(coded, coordinates=coded.coordinates - means[labels]).in_steps(coded.levels)
    return entropy_of(np.rint(residual)) + entropy_of(labels[:, None])


def _rounded(coded: _Coded) -> dict[str, dict[str, float]]:
    """Round in other ways, at the KL that plain rounding has."""
    ways: dict[str, Callable[[Array], Rounded]] = {
        "plain rounding": lambda values: _offset(values, 0.5, 0.0),
        "up from 0.55, values 0.02 outwards": lambda values: _offset(values, 0.55, 0.02),
        "up from 0.55, values 0.05 outwards": lambda values: _offset(values, 0.55, 0.05),
        "trellis, components above 1.6 steps": lambda values: trellis.rounded(values, least=1.6),
        "trellis, all components": lambda values: trellis.rounded(values, least=0.0),
    }
    target, found = 0.0, {}
    for what, way in ways.items():
        near, wide = (_measured(coded, way, step, coded.levels) for step in (1.0, _WIDER))
        target = target or near["kl"]
        share = float(np.log(target / near["kl"]) / np.log(wide["kl"] / near["kl"]))
        found[what] = {key: near[key] + share * (wide[key] - near[key]) for key in near} | {
            "largest_kl": near["largest_kl"]
        }
    return found | {"plain rounding, rows coarsened up to the target": _coarsened(coded, ways["plain rounding"])}


def _measured(coded: _Coded, way: Callable[[Array], Rounded], step: float, levels: Array) -> dict[str, float]:
    true = coded.in_steps(levels)
    numbers, values = way(true / step)
    compressed = _compressed(np.concatenate([_zigzag(numbers), levels], axis=1).astype(np.uint16), *_CHAINS[_NOW])
    kl = coded.kl(values * step, levels)
    outwards = float(((values * step - true) * true).sum() / (true**2).sum())
    return {"bytes": compressed["bytes"], "entropy": entropy_of(numbers), "kl": float(kl.mean(axis=0).max()),
            "largest_kl": float(kl.max()), "outwards": outwards}  # fmt: skip


def _coarsened(coded: _Coded, way: Callable[[Array], Rounded]) -> dict[str, float]:
    """Take rows a level coarser, as many as bring the mean up to the guard's target: not at equal KL."""
    mean = _measured(coded, way, 1.0, coded.levels)["kl"]
    count = int(len(coded.codes) * max(0.0, (coded.max_kl / mean - 1) / (2**0.5 - 1)))
    levels = coded.levels
    levels[np.linspace(0, len(levels) - 1, count).astype(np.int64)] -= 1
    return _measured(coded, way, 1.0, levels)


def _offset(values: Array, up_from: float, outwards: float) -> Rounded:
    magnitude = np.floor(np.abs(values) + 1 - up_from)
    meant = np.where(magnitude > 0, magnitude + outwards, 0.0)
    return (np.sign(values) * magnitude).astype(np.int64), np.sign(values) * meant


def _zigzag(numbers: Array) -> Array:
    return (numbers << 1) ^ (numbers >> 31)


def _unzigzag(codes: Array) -> Array:
    wide = codes.astype(np.int64)
    return (wide >> 1) ^ -(wide & 1)
