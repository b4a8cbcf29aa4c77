"""The demo's one architecture, of teachers and students alike: what differs is what they learn from."""

from __future__ import annotations

__all__ = ["network"]

from torch import nn

from jobs.demo.data import IMAGE_SIZE


def network(*, units: int = 64) -> nn.Sequential:
    """Build a ReLU network with two hidden layers: inputs [example, pixel] to logits [example, 10]."""
    return nn.Sequential(
        nn.Linear(IMAGE_SIZE * IMAGE_SIZE, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 10)
    )
