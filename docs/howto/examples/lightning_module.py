"""Soft targets in Lightning.

Run it as ``python docs/howto/examples/lightning_module.py --epochs 5``.
"""

from __future__ import annotations

import argparse
import tempfile

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn

import kdcache

NUM_TRAINING = 1_400
"""Digits to train on, of 1,797; the others are for testing."""


class Student(lightning.LightningModule):
    """A student whose training step knows soft targets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Classify pictures."""
        return self.layers(inputs)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor, kdcache.SoftTargets]) -> torch.Tensor:
        """Give the loss of a batch."""
        inputs, labels, soft_targets = batch
        return kdcache.distillation_loss(self(inputs), soft_targets, labels, temperature=4.0, soft_weight=0.9)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Choose Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def train(cache: kdcache.SoftTargetCache, transfer_set: kdcache.TransferSet, epochs: int) -> nn.Module:
    """Train a student with Lightning's Trainer."""
    student = Student()
    loader = kdcache.SoftTargetLoader(cache, transfer_set, batch_size=64, seed=0)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(student, loader)
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
