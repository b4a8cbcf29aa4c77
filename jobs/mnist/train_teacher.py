"""Train the teacher of the MNIST experiment: 2 x 1200 ReLU units, dropout, weight constraint, jitter up to 2 pixels.

    python -m jobs.mnist.train_teacher --seed 0

A run that was stopped is continued by the same command, with the same result as an uninterrupted one: after every
epoch the whole state is written, and all randomness of an epoch comes from (seed, epoch).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from jobs.mnist.data import DEFAULT_CACHE, IMAGE_SIZE, Split, fetch, publish, read_split
from jobs.mnist.models import constrain_incoming_norms, teacher
from kdcache.errors import JobError

_INITIAL_WEIGHTS = -1
_EVALUATION_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides which teacher comes out.

    Parameters
    ----------
    seed
        Of the initial weights, the order, the jitter and the dropout masks.
    num_epochs, batch_size
        How long, and how many examples a step.
    learning_rate
        Of Adam, at its highest; it rises over the first epoch and then follows half a cosine down to 0.
    max_norm
        Largest Euclidean norm of a unit's incoming weights.
    max_shift
        Largest jitter, in pixels, along each axis.
    bfloat16
        Matrix products in bfloat16 with float32 weights, which halves the time on CPUs that have such units.

    Raises
    ------
    JobError
        If a number is out of range.
    """

    seed: int = 0
    num_epochs: int = 150
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    max_norm: float = 2.0
    max_shift: int = 2
    bfloat16: bool = True

    def __post_init__(self) -> None:
        if self.seed < 0 or self.num_epochs < 1 or self.batch_size < 1 or self.max_shift < 0:
            raise JobError(f"expected seed, max_shift >= 0 and num_epochs, batch_size >= 1, got {self}")
        if not (self.learning_rate > 0 and self.max_norm > 0):
            raise JobError(f"expected learning_rate, max_norm > 0, got {self}")


class StateMismatchError(JobError):
    """The stored state belongs to another run."""


class Jitter:
    """Shifts images by whole pixels; what is shifted in is background.

    Parameters
    ----------
    images
        uint8 [example, height, width].
    max_shift
        Largest shift along each axis, in pixels.
    """

    def __init__(self, images: npt.NDArray[np.uint8], *, max_shift: int) -> None:
        self.max_shift = max_shift
        padded = np.pad(images, ((0, 0), (max_shift, max_shift), (max_shift, max_shift)))
        self._windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2))

    def read(self, examples: npt.NDArray[np.int64], generator: np.random.Generator) -> npt.NDArray[np.uint8]:
        """Return uint8 [example, height, width]: the examples, each shifted by an amount of its own."""
        rows, columns = generator.integers(0, 2 * self.max_shift + 1, size=(2, len(examples)))
        shifted: npt.NDArray[np.uint8] = self._windows[examples, rows, columns]
        return shifted


class Training:
    """A teacher in training: weights, optimiser, and the number of finished epochs."""

    def __init__(self, settings: Settings, split: Split) -> None:
        self.settings = settings
        self.num_finished = 0
        self.num_steps_per_epoch = math.ceil(len(split) / settings.batch_size)
        _seed_torch(settings.seed, _INITIAL_WEIGHTS)
        self.model = teacher()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate, fused=True)
        self._jitter = Jitter(split.images, max_shift=settings.max_shift)
        self._labels = torch.from_numpy(split.labels.astype(np.int64))

    def run_epoch(self) -> float:
        """Train one epoch, and return its mean cross-entropy in nats."""
        epoch = self.num_finished
        _seed_torch(self.settings.seed, epoch)
        generator = np.random.default_rng([self.settings.seed, epoch])
        self.model.train()
        sum_of_losses = 0.0
        for step, examples in enumerate(self._batches(generator)):
            rate = learning_rate(self.settings, epoch + step / self.num_steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            inputs = as_inputs(self._jitter.read(examples, generator))
            sum_of_losses += self._step(inputs, self._labels[examples]) * len(examples)
        self.num_finished += 1
        return sum_of_losses / len(self._labels)

    def _batches(self, generator: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
        order = generator.permutation(len(self._labels))
        for start in range(0, len(order), self.settings.batch_size):
            yield order[start : start + self.settings.batch_size]

    def _step(self, inputs: Tensor, labels: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            logits = self.model(inputs)
        loss = functional.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        constrain_incoming_norms(self.model, max_norm=self.settings.max_norm)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write the whole state to one safetensors file, completely or not at all."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        metadata = {"num_finished": str(self.num_finished), "settings": json.dumps(asdict(self.settings))}
        publish(safetensors.torch.save(tensors, metadata), path)

    def restore(self, path: Path) -> None:
        """Continue from a state that `save` wrote.

        Raises
        ------
        StateMismatchError
            If the state was written by a run with other settings; nothing is changed.
        """
        tensors, metadata = _read_safetensors(path)
        stored = json.loads(metadata["settings"])
        if stored != asdict(self.settings):
            raise StateMismatchError(
                f"{path} was written with {stored}, this run has {asdict(self.settings)}; "
                f"repeat the earlier options, or delete the file to start anew"
            )
        self.model.load_state_dict(_below("model.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.num_finished = int(metadata["num_finished"])


def learning_rate(settings: Settings, epochs: float) -> float:
    """Return the learning rate after `epochs` epochs: a linear rise over the first, then half a cosine down to 0."""
    warm_up = min(1.0, epochs + 0.01)
    return settings.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, epochs / settings.num_epochs)))


def as_inputs(images: npt.NDArray[np.uint8]) -> Tensor:
    """Return images, uint8 [example, height, width], as network inputs, float32 [example, pixel] from 0 to 1."""
    return torch.from_numpy(images.reshape(len(images), IMAGE_SIZE * IMAGE_SIZE).astype(np.float32)).div_(255)


@torch.no_grad()
def count_errors(model: nn.Module, split: Split) -> int:
    """Count the examples of a split that a model gets wrong, in evaluation mode and float32."""
    was_training = model.training
    model.eval()
    num_errors = 0
    for start in range(0, len(split), _EVALUATION_BATCH):
        predicted = model(as_inputs(split.images[start : start + _EVALUATION_BATCH])).argmax(dim=1)
        num_errors += int((predicted.numpy() != split.labels[start : start + _EVALUATION_BATCH]).sum())
    model.train(was_training)
    return num_errors


def load_teacher(path: Path) -> nn.Sequential:
    """Read a finished teacher, in evaluation mode.

    Raises
    ------
    JobError
        If the file is not there.
    """
    if not path.is_file():
        raise JobError(f"{path} does not exist; run `python -m jobs.mnist.train_teacher` from the repository root")
    model = teacher()
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def train(settings: Settings, *, cache: Path = DEFAULT_CACHE) -> Path:
    """Train a teacher, or continue, or find it finished; return the file of its weights.

    The weights are those after the last epoch: the test errors that are printed on the way choose nothing.

    Parameters
    ----------
    settings
        Of this teacher.
    cache
        Folder of the data, where `teacher-SEED.safetensors`, its state and its metrics (JSON lines) are written.
    """
    fetch(cache=cache)
    test = read_split("test", cache=cache)
    training = Training(settings, read_split("train", cache=cache))
    state_path = cache / f"teacher-{settings.seed}.state.safetensors"
    if state_path.is_file():
        training.restore(state_path)
    while training.num_finished < settings.num_epochs:
        started = time.perf_counter()
        loss = training.run_epoch()
        training.save(state_path)
        metrics = {
            "epoch": training.num_finished,
            "train_loss_nats": round(loss, 6),
            "test_errors": count_errors(training.model, test),
            "seconds": round(time.perf_counter() - started, 2),
        }
        _append_line(cache / f"teacher-{settings.seed}.metrics.jsonl", metrics)
    path = cache / f"teacher-{settings.seed}.safetensors"
    metadata = {"settings": json.dumps(asdict(settings)), "test_errors": str(count_errors(training.model, test))}
    publish(safetensors.torch.save(training.model.state_dict(), metadata), path)
    typer.echo(f"{path}: {metadata['test_errors']} errors on {len(test):,} test images")
    return path


def _seed_torch(seed: int, epoch: int) -> None:
    (word,) = np.random.SeedSequence([seed, epoch - _INITIAL_WEIGHTS]).generate_state(1, np.uint64)
    torch.manual_seed(int(word))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata())  # noqa: SIM118


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _append_line(path: Path, document: dict[str, Any]) -> None:
    line = json.dumps(document)
    typer.echo(line)
    with path.open("a", encoding="utf-8") as metrics:
        metrics.write(f"{line}\n")


def main(
    seed: Annotated[int, typer.Option(help="Of weights, order, jitter and dropout.")] = 0,
    num_epochs: Annotated[int, typer.Option(help="Epochs over the 60,000 images.")] = Settings.num_epochs,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = Settings.batch_size,
    rate: Annotated[float, typer.Option(help="Highest learning rate of Adam.")] = Settings.learning_rate,
    max_norm: Annotated[float, typer.Option(help="Largest norm of a unit's incoming weights.")] = Settings.max_norm,
    max_shift: Annotated[int, typer.Option(help="Largest jitter in pixels.")] = Settings.max_shift,
    bfloat16: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = Settings.bfloat16,
    num_threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder of the data and of what is written.")] = DEFAULT_CACHE,
) -> None:
    """Train the MNIST teacher; the same command continues a run that was stopped."""
    torch.set_num_threads(num_threads)
    settings = Settings(
        seed=seed,
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=rate,
        max_norm=max_norm,
        max_shift=max_shift,
        bfloat16=bfloat16,
    )
    train(settings, cache=cache)


if __name__ == "__main__":
    typer.run(main)
