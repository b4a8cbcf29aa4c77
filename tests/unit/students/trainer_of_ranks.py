"""Trains a causal model as one of the ranks that torch.distributed.run started, and keeps its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from test_transformers import causal_model, padded_batch, text_dataset

import kdcache
from kdcache.students.transformers import TrainerWithSoftTargets


def main(address: str, batch_size: str, kept: str) -> None:
    torch.set_num_threads(1)
    trainer = TrainerWithSoftTargets(
        causal_model(),
        transformers.TrainingArguments(
            output_dir=str(Path(kept).parent), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            per_device_train_batch_size=int(batch_size), num_train_epochs=2, learning_rate=1e-1, optim="sgd",
            lr_scheduler_type="constant", dataloader_pin_memory=False, logging_steps=1,
        ),
        train_dataset=text_dataset(), data_collator=padded_batch, cache=kdcache.open_cache(address), temperature=2.0,
        soft_weight=0.7,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"world_size": trainer.args.world_size, "weights": trainer.model.state_dict()}, kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
