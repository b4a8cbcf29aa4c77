"""What coding costs beside SmolLM2's forward pass, and how quickly codes are read.

One core, contestants in turns, processor time.

Encoding is the codes, the certificate of every row and the compressed shard; without writing it. From hidden states
it contains the product with the head that the forward pass then does not make, which is subtracted.
"""

from __future__ import annotations

__all__ = ["run"]

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.teachers import load, smollm2
from benchmarks.teachers.recorded import Recorded
from benchmarks.timing import interleaved
from kdcache.build.task import certify_codes
from kdcache.codecs import Decoder, SpectralCodec, parameters_to
from kdcache.codecs.head_logits import Head, HeadLogits, Logits
from kdcache.codecs.precision import quick_dtype
from kdcache.documents import Spectral
from kdcache.store.place import Place
from kdcache.store.shards import decode_shard, encode_shard
from kdcache.store.teachers import codec_shard_spec

MAX_KL: Final = 0.02
_NUM_PILOT_ROWS: Final = 2304
_NUM_ROWS: Final = 4096  # of a shard
_NUM_LOGITS_ROWS: Final = 1024  # logits take 200 kB a row
_WINDOWS: Final = 4
_ROUNDS: Final = 5
_CHUNK_ROWS: Final = 256


def run() -> list[dict[str, Any]]:
    """Time the forward pass in float32, and in bfloat16 where the processor has it, both ways in, and reading."""
    kinds = dict.fromkeys([quick_dtype(torch.bfloat16, torch.device("cpu")), torch.float32])
    return [*(row for kind in kinds for row in _beside_the_forward_pass(kind)), *_reading()]


def _beside_the_forward_pass(dtype: torch.dtype) -> list[dict[str, Any]]:
    teacher = smollm2.network().to(dtype)
    ids = smollm2.windows(smollm2.token_ids("main"), num_windows=_WINDOWS, window=smollm2.WINDOW)
    recorded = load("smollm2")
    pilot, rows = recorded.split(_NUM_ROWS, seed=0)
    head = Head(teacher.head.detach())
    states = HeadLogits(_hidden(recorded)[rows].to(dtype), head)
    logits = states[:_NUM_LOGITS_ROWS].to(dtype)
    evenly = torch.linspace(0, len(pilot) - 1, _NUM_PILOT_ROWS).long()
    decoder = _decoder(HeadLogits(_hidden(recorded)[pilot[evenly]].to(dtype), head))
    contestants: dict[str, tuple[Callable[[], object], int]] = {
        "forward": (_inference(lambda: teacher(ids)), ids.numel()),
        "body": (_inference(lambda: teacher.hidden(ids)), ids.numel()),
        "hidden states": (_inference(lambda: _encode(decoder, states)), len(states)),
        "logits": (_inference(lambda: _encode(decoder, logits)), len(logits)),
    }
    timings = interleaved(
        {name: run for name, (run, _) in contestants.items()}, rounds=_ROUNDS, clock=time.process_time
    )
    each = {name: [s / contestants[name][1] for s in timing.seconds] for name, timing in timings.items()}
    return [_row(dtype, each, way) for way in ("hidden states", "logits")]


def _row(dtype: torch.dtype, each: dict[str, list[float]], way: str) -> dict[str, Any]:
    added = [
        encode - (forward - body if way == "hidden states" else 0.0)
        for encode, forward, body in zip(each[way], each["forward"], each["body"], strict=True)
    ]
    shares = sorted(more / forward for more, forward in zip(added, each["forward"], strict=True))
    return {
        "what": f"encode from {way}, teacher in {str(dtype).removeprefix('torch.')}",
        "microseconds_a_row": 1e6 * float(np.median(each[way])),
        "forward_microseconds": 1e6 * float(np.median(each["forward"])),
        "added_share_of_forward": float(np.median(shares)),
        "of_single_rounds": [shares[0], shares[-1]],
        "rows_a_second": 1 / float(np.median(each[way])),
    }


def _encode(decoder: Decoder, logits: Logits) -> None:
    codes, errors = decoder.encode_measured(logits)
    certify_codes(decoder, logits, codes, errors)
    array = codes.numpy()
    encode_shard(array, _layout(decoder, len(array)))


def _layout(decoder: Decoder, num_rows: int) -> Any:
    codec = decoder.codec
    return codec_shard_spec(
        codec.spec,
        shard_rows=num_rows,
        chunk_rows=_CHUNK_ROWS,
        num_columns=codec.num_columns,
        storage_dtype=codec.storage_dtype,
    )


def _decoder(pilot: HeadLogits) -> Decoder:
    codec, parameters = SpectralCodec.fitted(Spectral(max_kl=MAX_KL), pilot.shape[1], pilot)
    return Decoder(codec, parameters_to(parameters, "cpu"))


def _inference(run: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(run)


def _reading() -> list[dict[str, Any]]:
    """Read codes of random rows, of 576 components as likely as those of SmolLM2."""
    recorded = load("smollm2")
    pilot, rows = recorded.split(_NUM_ROWS, seed=0)
    evenly = torch.linspace(0, len(pilot) - 1, _NUM_PILOT_ROWS).long()
    head = Head(_weight(recorded).bfloat16())
    decoder = _decoder(HeadLogits(_hidden(recorded)[pilot[evenly]].bfloat16(), head))
    codec = decoder.codec
    if not isinstance(codec, SpectralCodec):
        raise TypeError("expected the spectral codec")
    codes, _ = decoder.encode_measured(HeadLogits(_hidden(recorded)[rows].bfloat16(), head))
    layout = _layout(decoder, len(codes))
    shard = encode_shard(codes.numpy(), layout)
    place = Place("benchmark", "a shard", "Run it again.")

    def from_shard() -> Tensor:
        return codec.coordinates(torch.from_numpy(decode_shard(shard, layout, place=place)), decoder.parameters)

    contestants = {
        "codes in memory to coordinates": lambda: codec.coordinates(codes, decoder.parameters),
        "compressed shard to coordinates": from_shard,
    }
    timings = interleaved(contestants, rounds=2 * _ROUNDS, clock=time.process_time)
    return [
        {
            "what": name,
            "microseconds_a_row": 1e6 * timing.median / len(codes),
            "forward_microseconds": None,
            "added_share_of_forward": None,
            "of_single_rounds": None,
            "rows_a_second": len(codes) / timing.median,
        }
        for name, timing in timings.items()
    ]


def _hidden(recorded: Recorded) -> Tensor:
    if recorded.hidden is None:
        raise TypeError(f"{recorded.name}: no hidden states were recorded")
    return recorded.hidden


def _weight(recorded: Recorded) -> Tensor:
    if recorded.head is None:
        raise TypeError(f"{recorded.name}: no head was recorded")
    return recorded.head.weight
