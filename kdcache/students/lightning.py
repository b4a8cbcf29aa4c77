"""Students of Lightning: its Trainer takes kdcache's loaders as they are, and this callback tells them its epochs.

Importing this module imports lightning; nothing else in kdcache does.
"""

from __future__ import annotations

__all__ = ["SoftTargetEpochs"]

from typing import Any

from torch.utils import _pytree

from kdcache.errors import MissingExtraError
from kdcache.stream import SoftTargetLoader

try:
    from lightning import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError(
        "SoftTargetEpochs needs lightning, which is not installed here; run pip install 'kdcache[lightning]'"
    ) from error


class SoftTargetEpochs(Callback):
    """Lets every `SoftTargetLoader` among the training loaders give the epoch that Lightning is in.

    Lightning counts batches and never asks for the one after the last, by which a loader would notice that its epoch is
    over: without this callback every epoch has the order of the first, and a checkpoint of an epoch's last batch goes
    on with an epoch that is over. With it, each epoch has an order of its own, and a run that goes on from a
    checkpoint, within an epoch or at its end, takes the same steps as an undisturbed one. Lightning saves and loads the
    loader's state itself.

    Batches of `SoftTargetCache.join` need no callback: Lightning tells the epoch to their sampler.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's
        """Choose the epoch that training begins with: after a checkpoint, Lightning starts no epoch of its own."""
        _choose_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's
        """Choose the epoch that begins."""
        _choose_epoch(trainer)


def _choose_epoch(trainer: Trainer) -> None:
    for loader in _soft_target_loaders(trainer.train_dataloader):
        if loader.state_dict()["epoch"] != trainer.current_epoch:  # else it may be somewhere within, and shall stay
            loader.set_epoch(trainer.current_epoch)


def _soft_target_loaders(loaders: Any) -> list[SoftTargetLoader]:
    return [loader for loader in _pytree.tree_leaves(loaders) if isinstance(loader, SoftTargetLoader)]
