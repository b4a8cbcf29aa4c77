"""Checkpoints: the whole state of a sweep in one file that appears whole or not at all."""

from __future__ import annotations

__all__ = ["Checkpoint", "CheckpointFile", "refuse_other_identity"]

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.documents import differences
from kdcache.errors import JobError
from kdcache.store import LocalObjects
from kdcache.students.side_by_side import Way

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a sweep after some epochs.

    All randomness of an epoch comes from the sweep's seeds and the epoch's number, so the number of finished epochs
    stands for the state of every generator.

    Parameters
    ----------
    identity : mapping
        What decides the result, as JSON: the sweep's document, the digests of cache and transfer set.
    num_epochs : int
        Finished epochs.
    way : "stacked" or "looped"
        How the students are run side by side.
    students : mapping of str to Tensor [student, ...]
        Parameters and buffers.
    optimizer : mapping
        The optimiser's state.
    """

    identity: Mapping[str, Any]
    num_epochs: int
    way: Way
    students: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]


class CheckpointFile:
    """One checkpoint on disk, replaced atomically.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._objects = LocalObjects(path.parent)

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the file; on disk when this returns."""
        buffer = io.BytesIO()
        state = {
            "format_version": _FORMAT_VERSION,
            "identity": json.dumps(checkpoint.identity, sort_keys=True),
            "num_epochs": checkpoint.num_epochs,
            "way": checkpoint.way,
            "students": dict(checkpoint.students),
            "optimizer": dict(checkpoint.optimizer),
        }
        torch.save(state, buffer)
        self._objects.replace(self.path.name, buffer.getvalue())

    def read(self) -> Checkpoint | None:
        """Read the file with ``weights_only=True``; None where there is none.

        Raises
        ------
        JobError
            The file is no checkpoint of this version.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _parse(torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"))
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise JobError(
                f"{self.path} is no checkpoint that this version of kdcache can read ({error}). Delete the file, or "
                "train with --restart (resume=False), to start this sweep anew"
            ) from error

    def delete(self) -> None:
        """Remove the file, if there is one."""
        self._objects.delete(self.path.name)


def _parse(state: dict[str, Any]) -> Checkpoint:
    version = state.pop("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(f"it has format version {version}, expected {_FORMAT_VERSION}")
    return Checkpoint(identity=json.loads(state.pop("identity")), **state)


def refuse_other_identity(stored: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that was begun with another sweep, cache or transfer set.

    Raises
    ------
    JobError
        They differ; the message shows both sides of every difference, and nothing has been changed.
    """
    found = list(differences(dict(current), json.loads(json.dumps(stored))))
    if not found:
        return
    shown = "\n".join(f"  {path}: now {ours!r}, there {theirs!r}" for path, ours, theirs in found)
    raise JobError(
        f"{folder} holds a run of another job:\n{shown}\nNothing was changed. Restore the earlier settings, give "
        "another output folder, or train with --restart (resume=False) to overwrite that run"
    )
