"""A small convolutional network that learns from EfficientNet-Lite0: crops of photographs, 1,000 classes."""

from __future__ import annotations

__all__ = ["ConvolutionalNetwork", "open_image"]

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.students.subjects import Plan, Subject, thinned
from benchmarks.teachers import efficientnet, load
from benchmarks.teachers.pictures import cut

_SIZE: Final = 32
_WIDTHS: Final = (24, 48, 96)
_SEED: Final = 0


class ConvolutionalNetwork(nn.Module):
    """Three convolutions that halve the picture, and a linear layer over the last features' mean.

    Parameters
    ----------
    num_classes : int
    """

    def __init__(self, num_classes: int = efficientnet.NUM_CLASSES) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(_WIDTHS[-1], num_classes)

    def forward(self, pictures: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row class"]:
        """Give the logits."""
        logits: Tensor = self.head(self.features(pictures).mean((2, 3)))
        return logits


def open_image(plan: Plan) -> Subject:
    """Open EfficientNet-Lite0's recording beside the same crops, 32 pixels wide: regions do not overlap.

    Nobody has said what is on the crops, so there are no labels.
    """
    recorded = load("efficientnet-lite0")
    shown = efficientnet.pictures("main")
    drawn = efficientnet.crops("main", shown)
    if recorded.example_index.tolist() != [crop.region for crop in drawn]:
        raise ValueError("the recorded crops are not those drawn now; record them again: rm -r benchmarks/.cache")
    inputs = torch.stack([cut(shown[crop.photograph], crop, _SIZE) for crop in drawn]).sub(0.5).div(0.25)
    pilot, held_out = recorded.split(plan.num_held_out, seed=_SEED)
    train = thinned(pilot, plan.num_train)
    return Subject(
        name="image",
        title="EfficientNet-Lite0 on crops of photographs, 1,000 classes",
        train_inputs=inputs[train],
        held_out_inputs=inputs[held_out],
        train_logits=recorded.logits(train),
        held_out_logits=recorded.logits(held_out),
        held_out_labels=None,
        student=ConvolutionalNetwork,
    )
