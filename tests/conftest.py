"""Real data and teachers that come with a package: handwritten digits, and small networks trained on them."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from object_servers import ObjectServer, running
from sklearn.datasets import load_digits
from torch import nn

from kdcache import TransferSet

settings.register_profile("kdcache", deadline=None)  # a busy machine is no failure
settings.load_profile("kdcache")


def pytest_configure():
    """Keep temporary files in memory where there is room: a build syncs dozens of files, milliseconds each on disk."""
    memory = Path("/dev/shm")  # noqa: S108 - pytest makes a folder of this user's own in it
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Leave out what needs an accelerator where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator: there is no CUDA device")
    for item in items:
        if item.get_closest_marker("accelerator"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def the_processor_alone():
    """Keep whatever is not about an accelerator on the processor, on any machine; gives torch's own answer."""
    with pytest.MonkeyPatch.context() as patch:
        is_available = torch.cuda.is_available
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield is_available


@pytest.fixture(autouse=True)
def accelerator_where_marked(request, monkeypatch, the_processor_alone):
    """Give marked tests their accelerator, and keep processes that others start off it."""
    if request.node.get_closest_marker("accelerator"):
        monkeypatch.setattr(torch.cuda, "is_available", the_processor_alone)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@dataclass(frozen=True)
class Digits:
    inputs: torch.Tensor
    labels: np.ndarray

    @property
    def transfer_set(self) -> TransferSet:
        return TransferSet.from_arrays(self.inputs, labels=self.labels)


@pytest.fixture(scope="session")
def digits() -> Digits:
    bunch = load_digits()
    return Digits(torch.tensor(bunch.data / 16, dtype=torch.float32), bunch.target.astype(np.int64))


def train_teacher(digits: Digits, seed: int, *, epochs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    labels = torch.from_numpy(digits.labels)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(digits.inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return network.eval()


@pytest.fixture(scope="session")
def digit_teachers(digits) -> dict[str, nn.Module]:
    return {f"seed-{seed}": train_teacher(digits, seed) for seed in range(3)}


@pytest.fixture(scope="session")
def server_of(tmp_path_factory):
    """Give an object store by its name; started when first asked for, stopped after the last test."""
    servers: dict[str, ObjectServer] = {}
    with contextlib.ExitStack() as stack:

        def started(name):
            if name not in servers:
                servers[name] = stack.enter_context(running(name, tmp_path_factory.mktemp(name)))
            return servers[name]

        yield started


@pytest.fixture
def bucket_of(server_of, monkeypatch):
    """Give an empty address in an object store by its name; the environment leads there."""

    def address_in(name):
        server = server_of(name)
        for variable, value in server.environment().items():
            monkeypatch.setenv(variable, value)
        return server.new_address()

    return address_in
