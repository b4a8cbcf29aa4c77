"""Targets for KL on real teachers: what is asked for, what rows that no basis was fitted to get, and their bytes.

Each teacher's basis is fitted to rows of its main inputs; coded are rows of other examples of them, and inputs of
another kind (another author, emoji for photographs, other lines). Bytes are those of codes as a shard holds them, in
chunks of 256 rows; the basis is stored once a teacher and counted apart.
"""

from __future__ import annotations

__all__ = ["run"]

from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.teachers import load
from benchmarks.teachers.recorded import Recorded
from kdcache.codecs import Decoder, SpectralCodec, measure, parameters_to
from kdcache.codecs.head_logits import Head, HeadLogits, Logits
from kdcache.documents import Spectral
from kdcache.store.shards import encode_shard
from kdcache.store.teachers import codec_shard_spec

TEMPERATURES: Final = (1.0, 2.0, 4.0, 8.0, 20.0)
HELD: Final = 3  # of them the target is held at
TARGETS: Final = {
    "smollm2": (0.02, 0.005),
    "efficientnet-lite0": (0.0075, 0.02, 0.005),
    "ppocr": (0.012, 0.02, 0.005),
}
_NUM_HELD_OUT: Final = 2048
_NUM_PILOT_ROWS: Final = 2304
_CHUNK_ROWS: Final = 256
_BLOCK_ROWS: Final = 256


def run() -> list[dict[str, Any]]:
    """Code rows of every teacher at every target, of logits and, where a head was recorded, of hidden states."""
    return [row for name in TARGETS for row in _rows_of(name)]


def _rows_of(name: str) -> list[dict[str, Any]]:
    main, other = load(name, kind="main"), load(name, kind="other")
    pilot_rows, held_out = main.split(num_held_out=_NUM_HELD_OUT, seed=0)
    evenly = torch.linspace(0, len(pilot_rows) - 1, min(_NUM_PILOT_ROWS, len(pilot_rows))).long()
    others = torch.arange(min(_NUM_HELD_OUT, other.num_rows))
    found = []
    for way in ("logits", "hidden states") if name == "smollm2" else ("logits",):
        pilot = _given(main, pilot_rows[evenly], way)
        codec, parameters = SpectralCodec.fitted(Spectral(max_kl=TARGETS[name][0]), main.num_classes, pilot)
        last = _given(main, pilot_rows[evenly][-min(512, len(evenly) // 8) :], way)
        for target in TARGETS[name]:
            aimed = SpectralCodec(codec.spec.model_copy(update={"max_kl": target}), codec.num_classes)
            decoder = Decoder(aimed, parameters_to(aimed.with_fitted_step(parameters, last), "cpu"))
            for inputs, recorded, rows in (("held out", main, held_out), ("of another kind", other, others)):
                found.append({"teacher": name, "from": way, "rows": inputs, **_figures(decoder, recorded, rows, way)})
    return found


def _given(recorded: Recorded, rows: Tensor, way: str) -> Logits:
    if way == "logits" or recorded.hidden is None or recorded.head is None:
        return recorded.logits(rows)
    bias = recorded.head.bias
    head = Head(recorded.head.weight.bfloat16(), None if bias is None else bias.bfloat16())
    return HeadLogits(recorded.hidden[rows].bfloat16(), head)


def _figures(decoder: Decoder, recorded: Recorded, rows: Tensor, way: str) -> dict[str, Any]:
    codes, _ = decoder.encode_measured(_given(recorded, rows, way))
    divergences = torch.cat(
        [
            measure(recorded.logits(rows[start : start + _BLOCK_ROWS]), decoder.decode(block), TEMPERATURES)
            for start, block in zip(range(0, len(rows), _BLOCK_ROWS), codes.split(_BLOCK_ROWS), strict=True)
        ]
    )
    means = divergences.mean(dim=0)
    target = decoder.codec.spec.max_kl if isinstance(decoder.codec.spec, Spectral) else None
    return {
        "max_kl": target,
        "bytes_a_row": _stored_bytes(decoder, codes),
        "mean_kl": float(means[:HELD].amax()),
        "at_temperature": TEMPERATURES[int(means[:HELD].argmax())],
        "largest_kl": float(divergences.amax()),
        "mean_kl_up_to_20": float(means.amax()),
        "num_rows": len(rows),
        "basis_megabytes": sum(value.nbytes for value in decoder.parameters.values()) / 1e6,
    }


def _stored_bytes(decoder: Decoder, codes: Tensor) -> float:
    chunk_rows = min(_CHUNK_ROWS, len(codes))
    whole = len(codes) // chunk_rows * chunk_rows
    layout = codec_shard_spec(
        decoder.codec.spec,
        shard_rows=whole,
        chunk_rows=chunk_rows,
        num_columns=decoder.codec.num_columns,
        storage_dtype=decoder.codec.storage_dtype,
    )
    return len(encode_shard(codes[:whole].numpy(), layout)) / whole
