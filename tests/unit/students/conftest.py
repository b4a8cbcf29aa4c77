from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.cache import SoftTargetCache
from kdcache.documents import Optimizer, StudentSweep
from kdcache.students import Evaluation
from kdcache.transfer_set import TransferSet

NUM_INPUTS, NUM_CLASSES = 6, 3


class World(NamedTuple):
    """A transfer set of 40 examples, a real cache of two teachers over it, and examples to test on."""

    cache: SoftTargetCache
    transfer_set: TransferSet
    evaluation: Evaluation


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, NUM_INPUTS)).astype(np.float32)
    labels = inputs[:, :NUM_CLASSES].argmax(axis=1)
    transfer_set = TransferSet.from_arrays(inputs[:40], labels=labels[:40].tolist())
    teachers = {"a": _teacher(0.5), "b": _teacher(2.0)}
    cache = kdcache.build_cache(str(tmp_path_factory.mktemp("world") / "cache"), transfer_set, teachers)
    evaluation = Evaluation(torch.from_numpy(inputs[40:]), torch.from_numpy(labels[40:]))
    return World(cache, transfer_set, evaluation)


@pytest.fixture
def loader(world) -> kdcache.SoftTargetLoader:
    return kdcache.SoftTargetLoader(world.cache, world.transfer_set, batch_size=16)


@pytest.fixture
def batch(loader) -> tuple[Tensor, Tensor, kdcache.SoftTargets]:
    inputs, labels, soft_targets = next(iter(loader))
    assert labels is not None
    return inputs, labels, soft_targets


def _teacher(scale: float) -> nn.Module:
    teacher = nn.Linear(NUM_INPUTS, NUM_CLASSES)
    with torch.no_grad():
        teacher.weight.copy_(scale * torch.eye(NUM_CLASSES, NUM_INPUTS))
        teacher.bias.copy_(torch.arange(NUM_CLASSES) * 0.1 * scale)
    return teacher


@pytest.fixture
def make_mlp():
    return lambda: nn.Sequential(nn.Linear(NUM_INPUTS, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


@pytest.fixture
def make_sweep():
    def make(**options) -> StudentSweep:
        defaults = {"name": "small", "factory": "unused:unused", "epochs": 3, "batch_size": 16}
        optimizer = options.pop("optimizer", Optimizer(learning_rate=0.05))
        return StudentSweep(**{**defaults, **options}, optimizer=optimizer)

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"
