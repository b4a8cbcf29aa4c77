"""Results: what came out of a sweep, one student at a time, with its weights."""

from __future__ import annotations

__all__ = ["ResultsFile", "StudentResult", "write_weights"]

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from kdcache.errors import JobError
from kdcache.store import LocalObjects
from kdcache.students.evaluation import Scores
from kdcache.students.lineup import StudentSettings

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentResult:
    """One trained student.

    Parameters
    ----------
    sweep : str
        The sweep's name.
    student_index : int
        Its place in the sweep.
    settings : StudentSettings
        Its temperature, soft weight and seed.
    weights : Path
        A safetensors file; ``module.load_state_dict(safetensors.torch.load_file(weights))`` restores it.
    num_epochs : int
        Epochs it was trained for.
    train_loss : float or None
        Mean over the last epoch's rows; None when it was not finite, which means that the training diverged.
    test : Scores or None
        On the evaluation's examples; None without an evaluation.
    bias : tuple of float [class], optional
        The bias correction, to be added to the logits; it is not part of the weights.
    corrected_test : Scores, optional
        As `test`, with the bias added.
    """

    sweep: str
    student_index: int
    settings: StudentSettings
    weights: Path
    num_epochs: int
    train_loss: float | None
    test: Scores | None = None
    bias: tuple[float, ...] | None = None
    corrected_test: Scores | None = None

    @property
    def name(self) -> str:
        """The student's name within its sweep."""
        return self.settings.name


class ResultsFile:
    """The results of a finished sweep on disk, written last.

    Parameters
    ----------
    path : Path
        Weights stand beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, identity: Mapping[str, Any], results: Sequence[StudentResult]) -> None:
        """Write the results atomically."""
        document = {
            "format_version": _FORMAT_VERSION,
            "identity": dict(identity),
            "students": [_to_mapping(result) for result in results],
        }
        text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
        LocalObjects(self.path.parent).replace(self.path.name, text.encode())

    def read(self) -> tuple[dict[str, Any], list[StudentResult]] | None:
        """Read (identity, results); None when the sweep is not finished.

        Raises
        ------
        JobError
            The file is not of this version, or weights are missing.
        """
        if not self.path.exists():
            return None
        try:
            document = json.loads(self.path.read_bytes())
            results = [_from_mapping(item, self.path.parent) for item in document["students"]]
            identity, version = document["identity"], document["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{self.path} is no results file of kdcache ({error}); train with --restart (resume=False)"
            ) from error
        missing = [str(result.weights) for result in results if not result.weights.is_file()]
        if version != _FORMAT_VERSION or missing:
            found = f"weights are missing: {', '.join(missing)}" if missing else f"it has format version {version}"
            raise JobError(
                f"{self.path} cannot be used: {found}. Train with --restart (resume=False) to make them anew"
            )
        return identity, results

    def delete(self) -> None:
        """Remove the file, if there is one; weights stay."""
        LocalObjects(self.path.parent).delete(self.path.name)


def write_weights(path: Path, module: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a module's state as safetensors, atomically.

    Parameters
    ----------
    path : Path
    module : torch.nn.Module
        On the processor. Tensors that share memory are written once each under every name.
    metadata : mapping of str to str
        Kept in the file's header.
    """
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    LocalObjects(path.parent).replace(path.name, safetensors.torch.save(tensors, dict(metadata)))


def _to_mapping(result: StudentResult) -> dict[str, Any]:
    return {**asdict(result), "weights": result.weights.name}


def _from_mapping(mapping: Mapping[str, Any], folder: Path) -> StudentResult:
    fields = dict(mapping)
    for name in ("test", "corrected_test"):
        fields[name] = None if fields[name] is None else Scores(**fields[name])
    fields["bias"] = None if fields["bias"] is None else tuple(fields["bias"])
    fields["settings"] = StudentSettings(**fields["settings"])
    fields["weights"] = folder / fields["weights"]
    return StudentResult(**fields)
