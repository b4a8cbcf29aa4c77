"""Soft targets in transformers' Trainer.

Run it as ``python docs/howto/examples/trainer.py --epochs 5``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import nn
from transformers import TrainingArguments

import kdcache
from kdcache.students.transformers import TrainerWithSoftTargets

NUM_TRAINING = 1_400
"""Digits to train on, of 1,797; the others are for testing."""


class Student(nn.Module):
    """A model as Trainer likes it: it takes columns by name, and gives loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Classify pictures."""
        logits = self.layers(pixels)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(cache: kdcache.SoftTargetCache, dataset: Dataset, epochs: int, folder: str) -> nn.Module:
    """Train a student with transformers' Trainer."""
    student = Student()
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=3e-3,
        use_cpu=True, dataloader_pin_memory=False, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = TrainerWithSoftTargets(
        student, arguments, train_dataset=dataset, cache=cache, key="example_id", temperature=4.0, soft_weight=0.9
    )
    trainer.train()
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
        dataset = Dataset.from_dict(
            {
                "example_id": names,
                "pixels": inputs[:NUM_TRAINING].tolist(),
                "labels": labels[:NUM_TRAINING].tolist(),
            }
        )
        student = train(cache, dataset, epochs, folder)
    with torch.no_grad():
        predicted = student(inputs[NUM_TRAINING:])["logits"].argmax(dim=-1)
    accuracy = (predicted == labels[NUM_TRAINING:]).float().mean()
    print(f"student's accuracy after {epochs} epochs: {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
