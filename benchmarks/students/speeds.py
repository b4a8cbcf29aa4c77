"""How many rows a second a device encodes, and turns back into soft targets."""

from __future__ import annotations

__all__ = ["encode_speeds", "soften_speeds"]

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from benchmarks.students.kept_rows import OurRows, RowArm
from benchmarks.students.window_training import tensor_cores
from benchmarks.students.windows import WindowPlan, WindowSubject, now
from kdcache.codecs import Decoder
from kdcache.codecs.head_logits import Head, HeadLogits, Logits
from kdcache.documents import Spectral

_REPEATS: Final = 20
_ENCODED_BLOCKS: Final = 4

Speed = dict[str, Any]


def encode_speeds(subject: WindowSubject, arms: Sequence[RowArm], *, block_rows: int) -> Iterator[Speed]:
    """Give what encoding all rows took, and for spectral codes the same from logits and from a bfloat16 head."""
    hidden = subject.train.hidden[: _ENCODED_BLOCKS * block_rows].split(block_rows)
    for arm in arms:
        if not isinstance(arm.way, OurRows) or arm.encode_rows_per_second is None:
            continue
        is_spectral = isinstance(arm.way.ours.decoder.codec.spec, Spectral)
        given = "hidden states and a float32 head" if is_spectral else "hidden states, whose logits are made first"
        yield {"what": f"encode {arm.name}, from {given}", "rows_per_second": arm.encode_rows_per_second}
        if is_spectral:
            decoder = arm.way.ours.decoder.to(subject.device)
            logits = [subject.logits(block) for block in hidden]
            rate = _encode_rate(decoder, logits, subject)
            yield {"what": f"encode {arm.name}, from logits", "rows_per_second": rate}
            head = Head(subject.head.bfloat16())
            made = [HeadLogits(block, head) for block in hidden]
            rate = _encode_rate(decoder, made, subject)
            yield {"what": f"encode {arm.name}, from hidden states and a bfloat16 head", "rows_per_second": rate}


def soften_speeds(arms: Sequence[RowArm], subject: WindowSubject, plan: WindowPlan) -> Iterator[Speed]:
    """Give how quickly a batch becomes soft targets at temperature 2, bfloat16, on the device."""
    rows = plan.batch_windows * subject.train.tokens.shape[1]
    out = torch.zeros(rows, subject.num_classes, dtype=torch.bfloat16, device=subject.device)
    windows = torch.arange(plan.batch_windows, device=subject.device)
    for arm in arms:
        if arm.temperature in {None, 2.0}:

            def repeated(arm: RowArm = arm) -> None:
                for _ in range(_REPEATS):
                    arm.soften_into(out, windows, 2.0)

            with tensor_cores():
                rate = _rate(repeated, subject, _REPEATS * rows)
            yield {"what": f"soft targets of {arm.name}", "rows_per_second": rate}


def _encode_rate(decoder: Decoder, blocks: Sequence[Logits], subject: WindowSubject) -> float:
    work = lambda: [decoder.encode_measured(block) for block in blocks]  # noqa: E731 (named to be readable)
    return _rate(work, subject, sum(len(block) for block in blocks))


def _rate(work: Callable[[], object], subject: WindowSubject, num_rows: int) -> float:
    """Time some work that was done once before."""
    work()
    start = now(subject.device)
    work()
    return num_rows / (now(subject.device) - start)
