"""A cache of the examples of `identified`, in an order of its own, whose logits are their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from identified import NUM_EXAMPLES, input_of, name_of
from tiny_caches import build_tiny
from torch import nn

from kdcache import SoftTargetCache, TransferSet


class Echo(nn.Module):
    """A teacher whose logits are its input."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()


def echo_cache(folder: Path, *, id_of=name_of, **options: Any) -> SoftTargetCache:
    numbers = range(NUM_EXAMPLES)
    transfer_set = TransferSet.from_arrays(
        torch.stack([input_of(number) for number in numbers]),
        labels=[number % 4 for number in numbers],
        example_ids=[id_of(number) for number in numbers],
        **options,
    )
    return build_tiny(folder, transfer_set, {"echo": Echo()})


def decoded(soft_targets) -> torch.Tensor:
    return soft_targets.logits()[:, 0]


def is_joined(inputs: torch.Tensor, soft_targets) -> bool:
    """Whether every row is that of the input beside it. Decoded rows are shifted: compare what a shift leaves."""
    return torch.allclose(_centred(decoded(soft_targets)), _centred(inputs), atol=1e-3)


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)
