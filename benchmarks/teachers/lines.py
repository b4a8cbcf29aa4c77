"""Pictures of single lines of text, as a text recogniser sees them: a novel's lines, or figures and code."""

from __future__ import annotations

__all__ = ["HEIGHT", "PACKAGES", "WIDTH", "line_pictures"]

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.teachers import texts
from benchmarks.teachers.packages import file_of_package, require
from benchmarks.teachers.recorded import Kind

HEIGHT: Final = 48
WIDTH: Final = 400

_FONTS: Final = {
    "DejaVuSans.ttf": "3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22",
    "DejaVuSans-Bold.ttf": "b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167",
    "DejaVuSerif.ttf": "107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa",
    "DejaVuSerif-Italic.ttf": "3e7994fbc54fa10ce3352a42d548fadd7d9cadb69cb1109bc9d960f6dac57f04",
    "DejaVuSansMono.ttf": "602ec86b8948cfcd956482fe64f94c36c867770149ef2f791d4613f443bcecb3",
    "STIXGeneral.ttf": "167378031e2dddc6216d67819c9260e9a06ffc4c478e4e23cb98a6fd44b183c2",
}
_FOLDER: Final = "mpl-data/fonts/ttf"
_SIZES: Final = (20, 34)  # pixels
_MARGIN: Final = 10
_NAMES: Final = ("total", "index", "rate", "items", "key", "row", "delta", "x", "offset", "value")

PACKAGES: Final = {
    "main": {f"matplotlib {_FOLDER}/{font}": sha256 for font, sha256 in _FONTS.items()} | texts.PACKAGE,
    "other": {f"matplotlib {_FOLDER}/{font}": sha256 for font, sha256 in _FONTS.items()},
}


def line_pictures(kind: Kind, count: int, *, seed: int = 0) -> tuple[list[str], Float[Tensor, "line 3 height width"]]:
    """Draw lines of text: in six fonts, of many sizes, dark on light or light on dark, blurred and noisy.

    Parameters
    ----------
    kind
        "main": lines from all over Moby Dick; "other": prices, dates and code.
    count
        Lines to draw.
    seed
        Seed of everything drawn at random.

    Returns
    -------
    tuple[list[str], Tensor]
        What is written, and float32 [line, 3, 48, 400] from -1 to 1, channels blue, green, red.

    Raises
    ------
    SystemExit
        A package is missing, or a file is not the one expected.
    """
    generator = np.random.default_rng(seed)
    sources = _novel(count) if kind == "main" else (_figures(generator) for _ in range(count))
    drawn = [_draw(words, generator) for words in sources]
    return [line for line, _ in drawn], torch.stack([picture for _, picture in drawn])


def _novel(count: int) -> Iterator[Iterator[str]]:
    words = texts.moby_dick().split()
    for start in np.linspace(0, len(words) - 100, count).round().astype(int):
        yield iter(words[start : start + 100])


def _figures(generator: np.random.Generator) -> Iterator[str]:
    makers: tuple[Callable[[], str], ...] = (
        lambda: f"${generator.integers(1, 2000)}.{generator.integers(100):02d}",
        lambda: f"{generator.integers(1, 100)}%",
        lambda: f"20{generator.integers(10, 40)}-{generator.integers(1, 13):02d}-{generator.integers(1, 29):02d}",
        lambda: f"{generator.integers(24):02d}:{generator.integers(60):02d}",
        lambda: f"{generator.choice(_NAMES)}[{generator.integers(100)}]",
        lambda: f"0x{generator.integers(2**16):04X}",
        lambda: f"{generator.choice(_NAMES)} {generator.choice(['+=', '==', '!=', '<=', '*='])}",
        lambda: f"({generator.choice(_NAMES)}_{generator.choice(_NAMES)})",
        lambda: f"#{generator.integers(10**6):06d}",
    )
    while True:
        yield makers[generator.integers(len(makers))]()


def _draw(words: Iterator[str], generator: np.random.Generator) -> tuple[str, Tensor]:
    fonts = list(_FONTS)
    name = fonts[generator.integers(len(fonts))]
    file = file_of_package("matplotlib", f"{_FOLDER}/{name}", sha256=_FONTS[name])
    font = require("PIL.ImageFont").truetype(str(file), int(generator.integers(*_SIZES)))
    line = _fill(words, font)
    ground, ink = generator.integers(170, 256, 3), generator.integers(0, 90, 3)
    if generator.random() < 0.25:
        ground, ink = ink, ground
    image = require("PIL.Image").new("RGB", (WIDTH, HEIGHT), tuple(ground.tolist()))
    place = (_MARGIN, HEIGHT // 2 + int(generator.integers(-3, 4)))
    require("PIL.ImageDraw").Draw(image).text(place, line, fill=tuple(ink.tolist()), font=font, anchor="lm")
    image = image.filter(require("PIL.ImageFilter").GaussianBlur(generator.uniform(0, 1)))
    values = np.asarray(image, dtype=np.float32)[:, :, ::-1] / 127.5 - 1
    values = values + generator.normal(0, generator.uniform(0, 0.15), values.shape)
    return line, torch.from_numpy(values.clip(-1, 1).astype(np.float32)).permute(2, 0, 1)


def _fill(words: Iterator[str], font: Any) -> str:
    line = next(words)
    for word in words:
        if font.getlength(f"{line} {word}") > WIDTH - 2 * _MARGIN:
            break
        line = f"{line} {word}"
    return line
