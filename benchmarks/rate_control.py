"""What rate control rests on: the guard's cost, the rank of rounded logits, and why no sampled tail is a candidate."""

from __future__ import annotations

__all__ = ["run_guard", "run_ranks", "run_samples"]

from typing import Any

import torch
from torch import Tensor

from benchmarks import teachers
from benchmarks.timing import interleaved
from kdcache.build.task import certify_codes
from kdcache.codecs import Decoder, codec_for, fitted_codec, measure_codes, parameters_to
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.documents import CodecSpec, Codes, Spectral, TopK
from kdcache.errors import CodecError
from kdcache.store.shards import encode_shard
from kdcache.store.teachers import codec_shard_spec

ROUNDS = 3
CHUNK_ROWS = 256
PILOT_ROWS = {"efficientnet-lite0": 2048, "ppocr": 1024, "smollm2": 1024}
TARGETS = (1e-2, 1e-3)
SAMPLED = ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def _rows(name: str, *, num_pilot_rows: int | None = None, num_rows: int = CHUNK_ROWS) -> tuple[Tensor, Tensor]:
    """Give logits of a pilot and of rows of other examples."""
    recorded = teachers.load(name)
    pilot, held_out = recorded.split(num_rows)
    return recorded.logits(pilot[: num_pilot_rows or PILOT_ROWS[name]]), recorded.logits(held_out)


def run_guard() -> list[dict[str, Any]]:
    """Time encoding with and without a target, beside certifying, in microseconds a row."""
    found = []
    for name, num_pilot_rows in (("efficientnet-lite0", 2048), ("smollm2", 256)):
        pilot, rows = _rows(name, num_pilot_rows=num_pilot_rows)
        cases: list[tuple[CodecSpec, float]] = [*((Codes(), target) for target in TARGETS), (TopK(k=16), 1.0)]
        for spec, target in cases:
            found.append(_guard_cost(name, spec, target, pilot, rows))
    return found


def _guard_cost(name: str, spec: CodecSpec, target: float, pilot: Tensor, rows: Tensor) -> dict[str, Any]:
    plain, parameters = fitted_codec(spec, pilot.shape[1], pilot)
    decoder = Decoder(plain, parameters_to(parameters, "cpu"))
    guarding = Decoder(
        codec_for(type(spec).make(**{**dict(spec), "max_kl": target}), pilot.shape[1]), decoder.parameters
    )
    codes = decoder.encode(rows)
    timings = interleaved(
        {
            "plain": lambda: decoder.encode(rows),
            "guarding": lambda: _encoded(guarding, rows),
            "certify": lambda: certify_codes(decoder, rows, codes),
        },
        rounds=ROUNDS,
    )
    us = {key: 1e6 * timing.median / len(rows) for key, timing in timings.items()}
    return {"teacher": name, "codec": spec.kind, "max_kl": target, **us, "refused": not _encoded(guarding, rows)}


def _encoded(decoder: Decoder, rows: Tensor) -> bool:
    try:
        decoder.encode(rows)
    except CodecError:
        return False
    return True


def run_ranks() -> list[dict[str, Any]]:
    """Find the rank of logits as they are and rounded, and what a guarded basis then keeps of other rows."""
    known = _known_rank(2000 + CHUNK_ROWS, 500).split([2000, CHUNK_ROWS])
    wide = _known_rank(400 + CHUNK_ROWS, 3000).split([400, CHUNK_ROWS])
    pilots = {"rank 32, 2,000 rows of 500 classes": known, "rank 32, 400 rows of 3,000 classes": wide}
    pilots |= {name: _rows(name) for name in ("efficientnet-lite0", "smollm2")}
    return [
        _rank(name, pilot, rows, dtype)
        for name, (pilot, rows) in pilots.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]


def _known_rank(num_rows: int, num_classes: int, rank: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, rank, generator=generator)
    logits: Tensor = hidden @ torch.randn(rank, num_classes, generator=generator) * 3 / rank**0.5
    return logits


def _rank(name: str, pilot: Tensor, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    codec, parameters = fitted_codec(Spectral(max_kl=0.01), pilot.shape[1], pilot.to(dtype))
    decoder = Decoder(codec, parameters_to(parameters, "cpu"))
    rounded = rows.to(dtype)
    kl = measure_codes(decoder, rounded, decoder.encode(rounded), TEMPERATURES)
    return {
        "pilot": name,
        "type": str(dtype).removeprefix("torch."),
        "rank": codec.spec.rank if isinstance(codec.spec, Spectral) else None,
        "mean_kl": float(kl.mean(dim=0).amax()),
        "largest_kl": float(kl.amax()),
    }


def run_samples() -> list[dict[str, Any]]:
    """Hold sampled tails against class means: bytes, the KL that is told, and squared errors over squared targets."""
    specs = [TopK(k=k) for k in (8, 16, 32)]
    specs += [TopK(k=k, tail="samples", num_samples=count) for k, count in SAMPLED]
    return [
        _tail(name, spec, pilot, rows)
        for name in PILOT_ROWS
        for pilot, rows in [_rows(name)]
        for spec in specs
    ]  # fmt: skip


def _tail(name: str, spec: TopK, pilot: Tensor, rows: Tensor) -> dict[str, Any]:
    codec, parameters = fitted_codec(spec, pilot.shape[1], pilot)
    decoder = Decoder(codec, parameters_to(parameters, "cpu"))
    codes = decoder.encode(rows)
    layout = codec_shard_spec(
        spec, shard_rows=CHUNK_ROWS, chunk_rows=CHUNK_ROWS, num_columns=codec.num_columns,
        storage_dtype=codec.storage_dtype,
    )  # fmt: skip
    told = measure_codes(decoder, rows, codes, TEMPERATURES).mean(dim=0).tolist()
    found: dict[str, Any] = {
        "teacher": name,
        "tail": spec.tail,
        "k": spec.k,
        "drawn": spec.num_samples if spec.tail == "samples" else 0,
        "bytes": len(encode_shard(codes.numpy(), layout)) / len(rows),
    }
    for temperature, kl in zip(TEMPERATURES, told, strict=True):
        p = torch.softmax(rows.double() / temperature, dim=1)
        scaled = decoder.decode(codes, temperature=temperature).double() / temperature
        weights = scaled.exp() if codec.is_normalised else torch.softmax(scaled, dim=1)
        found[f"kl_{temperature:g}"] = kl
        found[f"squares_{temperature:g}"] = float((weights - p).square().sum() / p.square().sum())
        found[f"mean_row_{temperature:g}"] = float((weights - p).mean(dim=0).abs().sum())
    return found
