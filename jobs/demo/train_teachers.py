"""Train the demo's teachers: one network ten times, differing in nothing but its seed.

    python -m jobs.demo.train_teachers

They see the transfer set's images shifted by up to two pixels, so they know something that its images and labels do
not tell. A checkpoint that stands and was made by the same recipe from the same data is kept.
"""

from __future__ import annotations

__all__ = ["JOB", "Recipe", "shifted", "train_teacher", "train_teachers"]

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from jobs.demo.data import IMAGE_SIZE
from kdcache import TransferSet
from kdcache.jobs import LoadedJob, read_job

JOB: Final = Path(__file__).parent / "job.toml"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all teachers have in common: Adam, with a learning rate that falls to 0 along half a cosine."""

    num_epochs: int = 50
    batch_size: int = 100
    learning_rate: float = 2e-3
    max_shift: int = 2
    """Pixels, along each axis."""


def train_teachers(
    loaded: LoadedJob, recipe: Recipe, *, progress: Callable[[str, int, int], None] = lambda _text, _done, _total: None
) -> int:
    """Train the job's teachers that are not trained yet, and return how many those were.

    A teacher's seed is its place in the job file, and its checkpoint stands where the job file says.

    Parameters
    ----------
    loaded : LoadedJob
        A job whose teachers all have a checkpoint.
    recipe : Recipe
    progress : callable (text, teachers done, teachers in all)
    """
    transfer_set: TransferSet = loaded.make(loaded.job.transfer_set)
    num_trained = 0
    for seed, source in enumerate(loaded.job.teachers):
        progress(source.name, seed, len(loaded.job.teachers))
        path = loaded.folder / str(source.checkpoint)
        origin = {"seed": seed, "recipe": asdict(recipe), "network": source.to_mapping(), "data": transfer_set.digest()}
        if _origin_of(path) == origin:
            continue
        torch.manual_seed(seed)
        teacher: nn.Module = loaded.make(source)
        train_teacher(teacher, transfer_set, recipe)
        _publish(teacher, path, origin)
        num_trained += 1
    progress("all teachers", len(loaded.job.teachers), len(loaded.job.teachers))
    return num_trained


def train_teacher(teacher: nn.Module, transfer_set: TransferSet, recipe: Recipe) -> None:
    """Train one teacher on hard labels, in place; order and shifts come from torch's global generator."""
    images = torch.as_tensor(transfer_set.read_inputs(range(len(transfer_set))))
    labels = torch.as_tensor(transfer_set.labels)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=recipe.learning_rate, fused=True)
    num_steps = recipe.num_epochs * math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    teacher.train()
    for _ in range(recipe.num_epochs):
        for examples in torch.randperm(len(images)).split(recipe.batch_size):
            logits = teacher(shifted(images[examples], max_shift=recipe.max_shift))
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(logits, labels[examples]))
            optimizer.step()
            schedule.step()


def shifted(images: Tensor, *, max_shift: int) -> Tensor:
    """Shift each image [example, pixel] by whole pixels of its own; what is shifted in is background, 0."""
    padded = functional.pad(images.view(-1, IMAGE_SIZE, IMAGE_SIZE), (max_shift,) * 4)
    windows = padded.unfold(1, IMAGE_SIZE, 1).unfold(2, IMAGE_SIZE, 1)
    down, right = torch.randint(0, 2 * max_shift + 1, (2, len(images)))
    return windows[torch.arange(len(images)), down, right].flatten(1)


def _origin_of(path: Path) -> Any:
    """Read what a checkpoint was made from; None where there is none that can be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get("origin", "null"))
    except (OSError, ValueError, safetensors.SafetensorError):
        return None


def _publish(teacher: nn.Module, path: Path, origin: dict[str, Any]) -> None:
    """Write a checkpoint completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(teacher.state_dict(), partial, {"origin": json.dumps(origin)})
    partial.replace(path)


def main() -> None:
    """Train the demo's teachers."""
    loaded = read_job(JOB)
    num_trained = train_teachers(loaded, Recipe())
    print(f"trained {num_trained} of {len(loaded.job.teachers)} teachers; the others stood already")


if __name__ == "__main__":
    typer.run(main)
