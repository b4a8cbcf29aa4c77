"""Recordings on disk: made once from a recipe, found again by the recipe's digest, opened as memory maps."""

from __future__ import annotations

__all__ = ["Recipe", "progress", "recorded_arrays"]

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.teachers.packages import CACHE

Arrays = Mapping[str, npt.NDArray[Any]]
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a recording follows from; two recipes that differ in anything make two recordings.

    Parameters
    ----------
    teacher, what
        Names of the teacher and of what is recorded of it, for people: they begin the folder's name.
    version
        Raised by hand when the code that records comes to give other numbers.
    packages
        What it is made from: package name and version -> SHA-256 of the file read from it.
    settings
        Counts, sizes and seeds.
    """

    teacher: str
    what: str
    version: int
    packages: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Hash the recipe, whatever the order of its entries: SHA-256 in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name of the folder a recording of this recipe lies in."""
        return f"{self.teacher}-{self.what}-{self.digest()[:12]}"


def recorded_arrays(
    recipe: Recipe, make: Callable[[], Arrays], *, root: Path = CACHE / "recordings"
) -> dict[str, npt.NDArray[Any]]:
    """Open the recording of a recipe; make it first if there is none.

    The folder appears under its name when it is complete, so an interrupted recording is simply made again.

    Parameters
    ----------
    recipe
        What to record.
    make
        Gives the arrays by name; called only when the recording does not exist.
    root
        Folder that holds recordings.

    Returns
    -------
    dict[str, ndarray]
        The arrays, mapped from their files; writing to them changes no file.
    """
    folder = root / recipe.folder_name
    if not folder.is_dir():
        _record(recipe, make, folder)
    return {file.stem: np.load(file, mmap_mode="c") for file in sorted(folder.glob("*.npy"))}


def progress(items: Iterable[_Item], total: int, description: str) -> Iterator[_Item]:
    """Go through items with a progress line on standard error."""
    yield from track(items, description, total=total, console=Console(stderr=True))


def _record(recipe: Recipe, make: Callable[[], Arrays], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    arrays = make()
    made = Path(tempfile.mkdtemp(prefix=f".{recipe.folder_name}-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(made / f"{name}.npy", array)
        document = {"recipe": asdict(recipe), "digest": recipe.digest(), "made_with": _made_with()}
        (made / "recipe.json").write_text(json.dumps(document, indent=2) + "\n")
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        if folder.is_dir():  # somebody else was quicker with the same recipe
            return
        raise


def _made_with() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "command": Path(sys.argv[0]).name,
    }
