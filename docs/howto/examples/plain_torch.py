"""Soft targets in a plain torch loop.

Run it as ``python docs/howto/examples/plain_torch.py --epochs 5``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

import kdcache

NUM_TRAINING = 1_400
"""Digits to train on, of 1,797; the others are for testing."""


def train(cache: kdcache.SoftTargetCache, transfer_set: kdcache.TransferSet, epochs: int) -> nn.Module:
    """Train a student from a cache and the inputs that it was built from."""
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    loader = kdcache.SoftTargetLoader(cache, transfer_set, batch_size=64, seed=0)
    for _ in range(epochs):
        for inputs, labels, soft_targets in loader:
            loss = kdcache.distillation_loss(student(inputs), soft_targets, labels, temperature=4.0, soft_weight=0.9)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student


def teacher_of(inputs: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Train a teacher for a moment."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(teacher(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.eval()


def main(epochs: int) -> None:
    """Build a cache, train a student from it, and print how good it is."""
    bunch = load_digits()
    inputs, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    names = [f"digit-{number}" for number in range(NUM_TRAINING)]
    with tempfile.TemporaryDirectory() as folder:
        transfer_set = kdcache.TransferSet.from_arrays(
            inputs[:NUM_TRAINING], labels=labels[:NUM_TRAINING], example_ids=names
        )
        teacher = teacher_of(inputs[:NUM_TRAINING], labels[:NUM_TRAINING])
        kdcache.build_cache(f"{folder}/digits", transfer_set, {"teacher": teacher})
        cache = kdcache.open_cache(f"{folder}/digits")
        student = train(cache, transfer_set, epochs)
    with torch.no_grad():
        predicted = student(inputs[NUM_TRAINING:]).argmax(dim=-1)
    accuracy = (predicted == labels[NUM_TRAINING:]).float().mean()
    print(f"student's accuracy after {epochs} epochs: {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
