"""Lightning's own Trainer on kdcache's loaders: every epoch, every checkpoint, the same steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_caches import build_tiny, tiny_labels, tiny_transfer_set
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import kdcache
from kdcache import SoftTargetLoader

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402 - it needs lightning

pytestmark = [
    # torchdata 0.11 calls what torch 2.13 has deprecated
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # advice on the number of workers, which a test has no use for
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # a run that goes on writes its checkpoints elsewhere, and Lightning says that it forgets their scores
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    # Lightning 2.6 makes what torch 2.13 has deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]

BATCH_SIZE = 10
NUM_BATCHES = 4


class Student(lightning.LightningModule):
    """Keeps the loss of every step, and the first inputs of its batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(4, 5)
        self.losses = []
        self.batches = []

    def training_step(self, batch, batch_index):  # noqa: ARG002 - Lightning's own signature
        inputs, soft_targets = batch_parts(batch)
        loss = kdcache.distillation_loss(self.network(inputs), soft_targets, temperature=2.0, soft_weight=1.0)
        self.losses.append(float(loss.detach()))
        self.batches.append(inputs[:, 0].tolist())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batch_parts(batch):
    if isinstance(batch, dict):
        return batch["input"], batch["soft_targets"]
    return batch[0], batch[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("lightning") / "cache")


class Pictures(torch.utils.data.Dataset):
    def __init__(self):
        self.inputs = tiny_transfer_set().read_inputs(range(40))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"input": self.inputs[index], "label": tiny_labels()[index], "example_id": index}


def soft_target_loader(cache):
    return SoftTargetLoader(cache, tiny_transfer_set(), batch_size=BATCH_SIZE, seed=3)


def joined_stateful_loader(cache):
    pictures = Pictures()
    sampler = StatefulDistributedSampler(pictures, num_replicas=1, rank=0, seed=3)
    return cache.join(StatefulDataLoader(pictures, batch_size=BATCH_SIZE, sampler=sampler))


def joined_loader(cache):
    return cache.join(DataLoader(Pictures(), batch_size=BATCH_SIZE, shuffle=True))


@pytest.fixture
def fit(tmp_path):
    """Trains a student three epochs, with a checkpoint behind every step; goes on behind a step of the first run."""
    run_numbers = itertools.count()

    def train(loader, *, after_step=None):
        student = Student()
        folder = tmp_path / f"run-{next(run_numbers)}"
        checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, max_epochs=3, callbacks=[checkpoints],
        )  # fmt: skip
        trainer.fit(student, loader, ckpt_path=after_step and str(tmp_path / "run-0" / f"step={after_step}.ckpt"))
        return student

    return train


@pytest.mark.parametrize("make", [soft_target_loader, joined_stateful_loader, joined_loader])
def test_a_student_is_trained(cache, fit, make):
    student = fit(make(cache))
    assert len(student.losses) == 3 * NUM_BATCHES
    assert sum(student.losses[-NUM_BATCHES:]) < sum(student.losses[:NUM_BATCHES])


@pytest.mark.parametrize("make", [soft_target_loader, joined_stateful_loader, joined_loader])
def test_every_epoch_has_an_order_of_its_own(cache, fit, make):
    batches = fit(make(cache)).batches
    epochs = [batches[start : start + NUM_BATCHES] for start in range(0, 3 * NUM_BATCHES, NUM_BATCHES)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("after_step", [2, 4, 7], ids=["within an epoch", "at its last batch", "within a later one"])
def test_a_run_that_goes_on_has_the_losses_of_an_undisturbed_one(cache, fit, after_step):
    undisturbed = fit(soft_target_loader(cache))
    resumed = fit(soft_target_loader(cache), after_step=after_step)
    assert resumed.losses == undisturbed.losses[after_step:]


@pytest.mark.parametrize("after_step", [2, 7])
def test_a_joined_stateful_loader_goes_on_within_an_epoch(cache, fit, after_step):
    undisturbed = fit(joined_stateful_loader(cache))
    resumed = fit(joined_stateful_loader(cache), after_step=after_step)
    assert resumed.losses == undisturbed.losses[after_step:]


def test_loaders_in_collections_are_told_the_epoch_too(cache, fit):
    class OfTwo(Student):
        def training_step(self, batch, batch_index):
            return super().training_step(batch["first"], batch_index)

    loaders = {"first": soft_target_loader(cache), "second": soft_target_loader(cache)}
    student = OfTwo()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(student, loaders)
    assert student.losses == fit(soft_target_loader(cache)).losses[: 2 * NUM_BATCHES]


@pytest.mark.parametrize("make", [soft_target_loader, joined_loader])
def test_lightning_moves_soft_targets_to_its_device(cache, make):
    batch = next(iter(make(cache)))
    moved = Student().transfer_batch_to_device(batch, torch.device("meta"), 0)
    inputs, soft_targets = batch_parts(moved)
    assert {inputs.device.type, soft_targets.device.type} == {"meta"}
