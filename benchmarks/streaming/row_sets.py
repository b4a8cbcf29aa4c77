"""Row sets: rows of soft targets that every contestant stores and reads, made once from what real teachers said."""

from __future__ import annotations

__all__ = ["ROW_SETS", "Column", "RowSet", "open_row_set"]

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import kdcache
from benchmarks.streaming.repeated import repeated_cache, repeats
from benchmarks.teachers import load
from benchmarks.teachers.packages import CACHE

ROOT: Final = CACHE / "streaming"
TEACHER: Final = "teacher"
_TOP: Final = 64
_BLOCK_ROWS: Final = 256
_QUICK_SHARE: Final = 5
_MIN_SHARE: Final = 0.6  # of the picture that a mixed row is named after

Arrays = dict[str, npt.NDArray[Any]]


class Column(NamedTuple):
    """What a contestant stores under one name: [row, width] of a dtype."""

    dtype: str
    width: int


@dataclass(frozen=True)
class RowSet:
    """Rows on disk: a kdcache of them, the plain arrays that others store, and the folders of the others.

    Parameters
    ----------
    name : str
    title : str
        For people.
    folder : Path
        Holds ``cache``, ``rows/NAME.npy``, ``codes.npy`` and ``stored/FORMAT``.
    """

    name: str
    title: str
    folder: Path

    @property
    def cache_folder(self) -> Path:
        """Where kdcache's own files stand."""
        return self.folder / "cache"

    @property
    def codes(self) -> npt.NDArray[Any]:
        """What the cache holds, [row, column], as plain zarr-python reads it; mapped."""
        return np.asarray(np.load(self.folder / "codes.npy", mmap_mode="r"))

    @property
    def arrays(self) -> Arrays:
        """What others store, by name, [row, width]; mapped."""
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted((self.folder / "rows").glob("*.npy"))}

    @property
    def columns(self) -> Mapping[str, Column]:
        """Dtype and width of what others store, by name."""
        return {name: Column(array.dtype.name, array.shape[1]) for name, array in self.arrays.items()}

    @property
    def num_rows(self) -> int:
        """Rows of the set."""
        return len(self.codes)

    def stored(self, stored_as: str) -> Path:
        """Give the folder of a format; kdcache's own for "cache"."""
        return self.cache_folder if stored_as == "cache" else self.folder / "stored" / stored_as


class _Recipe(NamedTuple):
    title: str
    num_rows: int
    make: Callable[[int, Path], Arrays | None]


def open_row_set(name: str, *, quick: bool = False) -> RowSet:
    """Open a row set, and make it first where it is not there.

    Parameters
    ----------
    name : str
        One of `ROW_SETS`.
    quick : bool
        A fifth of the rows.
    """
    recipe = ROW_SETS[name]
    num_rows = recipe.num_rows // _QUICK_SHARE if quick else recipe.num_rows
    folder = ROOT / f"{name}-{num_rows}"
    if not folder.is_dir():
        _make(recipe, num_rows, folder)
    return RowSet(name, recipe.title, folder)


def lookup_teacher(logits: Tensor) -> nn.Module:
    """Make a teacher that answers the number of a row with its logits, as they were recorded."""
    return _Lookup(logits).eval()


def mixed_logits(num_rows: int) -> Tensor:
    """Give float16 [row, class] logits of EfficientNet-Lite0: recorded crops in turn, each mixed with another one.

    A row is w z + (1 - w) z' with w drawn from 0.6 to 1, so that no two rows are alike.
    """
    recorded = load("efficientnet-lite0")
    logits = recorded.logits(slice(0, recorded.num_rows))
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(num_rows) % len(logits)
    others = torch.randint(0, len(logits), (num_rows,), generator=generator)
    share = _MIN_SHARE + (1 - _MIN_SHARE) * torch.rand(num_rows, 1, generator=generator)
    mixed = torch.empty(num_rows, logits.shape[1], dtype=torch.float16)
    for rows in torch.arange(num_rows).split(_BLOCK_ROWS):
        mixed[rows] = (share[rows] * logits[own[rows]] + (1 - share[rows]) * logits[others[rows]]).half()
    return mixed


class _Lookup(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.get_buffer("logits").index_select(0, rows)
        return found


def _make(recipe: _Recipe, num_rows: int, folder: Path) -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=ROOT))
    try:
        arrays = recipe.make(num_rows, made / "cache")
        array = kdcache.open_cache(made / "cache").as_zarr()[f"teachers/{TEACHER}/codes"]
        codes = np.asarray(array[:num_rows])  # type: ignore[index]
        np.save(made / "codes.npy", codes)
        (made / "rows").mkdir()
        for name, values in (arrays or {"values": codes}).items():
            np.save(made / "rows" / f"{name}.npy", values)
        (made / "row_set.json").write_text(json.dumps({"title": recipe.title, "num_rows": num_rows}) + "\n")
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _build(num_rows: int, folder: Path, codec: Any) -> None:
    teacher = lookup_teacher(mixed_logits(num_rows))
    inputs = kdcache.TransferSet.from_arrays(torch.arange(num_rows))
    kdcache.build_cache(folder, inputs, {TEACHER: teacher}, codec=codec)


def _recorded(codec: Any) -> kdcache.SoftTargetCache:
    """Open a cache of all recorded tokens of SmolLM2, built from hidden states and the head, the first time."""
    main, other = load("smollm2", kind="main"), load("smollm2", kind="other")
    if main.hidden is None or other.hidden is None or main.head is None:
        raise TypeError("smollm2 was recorded without hidden states")
    head = nn.Linear(main.hidden.shape[1], main.num_classes, bias=False)
    head.weight.data = main.head.weight.bfloat16()
    inputs = kdcache.TransferSet.from_arrays(torch.cat([main.hidden, other.hidden]).bfloat16())
    teacher = kdcache.TeacherWithHead(nn.Identity(), head).eval()
    folder = ROOT / f"recorded-{codec.kind}"
    return kdcache.build_cache(folder, inputs, {TEACHER: teacher}, codec=codec, shard_rows=4096)


def _float16(num_rows: int, folder: Path) -> None:
    _build(num_rows, folder, kdcache.Lossless(dtype="float16"))


def _codes(num_rows: int, folder: Path) -> None:
    _build(num_rows, folder, kdcache.Codes())


def _coefficients(num_rows: int, folder: Path) -> None:
    recorded = _recorded(kdcache.Spectral(max_kl=0.02))
    repeated_cache(recorded, repeats(recorded.document.num_rows, num_rows), folder)


def _top(num_rows: int, folder: Path) -> Arrays:
    recorded = _recorded(kdcache.TopK(k=_TOP))
    source_rows = repeats(recorded.document.num_rows, num_rows)
    repeated_cache(recorded, source_rows, folder)
    ids, values = _largest_logits()
    return {"ids": ids[source_rows], "values": values[source_rows]}


@torch.inference_mode()
def _largest_logits() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
    """Give the classes, int32 [row, k], and logits, float16 [row, k], of the largest logits of all recorded tokens."""
    ids, values = [], []
    for kind in ("main", "other"):
        recorded = load("smollm2", kind=kind)
        for start in range(0, recorded.num_rows, _BLOCK_ROWS):
            largest = recorded.logits(slice(start, start + _BLOCK_ROWS)).topk(_TOP)
            ids.append(largest.indices.int())
            values.append(largest.values.half())
    return torch.cat(ids).numpy(), torch.cat(values).numpy()


ROW_SETS: Final = {
    "float16": _Recipe("100,000 x 1,000 logits in float16 (EfficientNet-Lite0)", 100_000, _float16),
    "codes": _Recipe("the same as uint8 codes", 100_000, _codes),
    "coefficients": _Recipe("200,000 x 576 spectral coefficients in uint16 (SmolLM2-135M)", 200_000, _coefficients),
    "top-64": _Recipe("200,000 tokens with the 64 largest of 49,152 logits (SmolLM2-135M)", 200_000, _top),
}
"""Row sets by name."""
