"""What a student has learnt, measured on rows held out, against the teacher's own logits."""

from __future__ import annotations

__all__ = ["Scores", "calibration_error", "score", "score_rows", "summarised"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.students.subjects import Subject

_BLOCK_ELEMENTS: Final = 2**20
_NUM_BINS: Final = 15


@dataclass(frozen=True)
class Scores:
    """Means over the rows held out.

    Parameters
    ----------
    kl : float
        KL(teacher || student) at temperature 1, nats: lower is better, as for all but `agreement`.
    kl_at_temperature : float
        The same at the temperature that the student learnt at.
    agreement : float
        Share of rows where student and teacher prefer the same class.
    calibration_error : float
        Expected calibration error at temperature 1. Against the true classes, or where nobody knows them, against the
        probability that the teacher gives to the class that the student prefers.
    cross_entropy : float, optional
        With the true classes, nats; None where nobody knows them.
    """

    kl: float
    kl_at_temperature: float
    agreement: float
    calibration_error: float
    cross_entropy: float | None


@torch.inference_mode()
def score(student: nn.Module, subject: Subject, temperature: float) -> Scores:
    """Measure a student, in float32.

    Parameters
    ----------
    student : nn.Module
    subject : Subject
    temperature : float
        That it learnt at.
    """
    step = max(1, _BLOCK_ELEMENTS // subject.num_classes)
    labels = subject.held_out_labels
    blocks = [slice(start, start + step) for start in range(0, len(subject.held_out_inputs), step)]
    rows = [
        score_rows(student(subject.held_out_inputs[one]), subject.held_out_logits[one], temperature,
                   None if labels is None else labels[one])
        for one in blocks
    ]  # fmt: skip
    return summarised({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, labels)


def summarised(columns: Mapping[str, Float[Tensor, " row"]], labels: Int[Tensor, " row"] | None) -> Scores:
    """Give the means of what `score_rows` gave of all rows."""
    known = slice(None) if labels is None else labels >= 0
    return Scores(
        kl=float(columns["kl"].mean()),
        kl_at_temperature=float(columns["kl_at_temperature"].mean()),
        agreement=float(columns["agreement"].mean()),
        calibration_error=calibration_error(columns["confidence"][known], columns["right"][known]),
        cross_entropy=None if labels is None else float(columns["cross_entropy"][known].mean()),
    )


def calibration_error(confidence: Float[Tensor, " row"], right: Float[Tensor, " row"]) -> float:
    """Give the expected calibration error over 15 equal bins (Guo et al. 2017, equation 3).

    Parameters
    ----------
    confidence : Tensor [row]
        Probability of the class that is preferred.
    right : Tensor [row]
        1 where it is the true one, 0 elsewhere; or the probability that it is.

    Examples
    --------
    >>> round(calibration_error(torch.tensor([0.9, 0.9, 0.5]), torch.tensor([1.0, 0.0, 0.5])), 4)
    0.2667
    """
    bins = (confidence * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    gaps = torch.zeros(_NUM_BINS, dtype=torch.float64).index_add_(0, bins, (confidence - right).double())
    return float(gaps.abs().sum() / len(confidence))


def score_rows(
    own: Float[Tensor, "row class"],
    teachers: Float[Tensor, "row class"],
    temperature: float,
    labels: Int[Tensor, " row"] | None,
) -> dict[str, Float[Tensor, " row"]]:
    """Measure rows one by one: a student's logits against the teacher's, and the true classes where they are known."""
    log_own = own.log_softmax(dim=1)
    confidence, preferred = log_own.max(dim=1)
    kl = _divergence(teachers, own, 1.0)
    columns = {
        "kl": kl,
        "kl_at_temperature": kl if temperature == 1 else _divergence(teachers, own, temperature),
        "agreement": (preferred == teachers.argmax(dim=1)).float(),
        "confidence": confidence.exp(),
    }
    if labels is None:
        return columns | {"right": teachers.softmax(dim=1).gather(1, preferred[:, None])[:, 0]}
    cross_entropy = -log_own.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return columns | {"right": (preferred == labels).float(), "cross_entropy": cross_entropy}


def _divergence(
    teachers: Float[Tensor, "row class"], own: Float[Tensor, "row class"], temperature: float
) -> Float[Tensor, " row"]:
    log_teacher, log_own = ((logits / temperature).log_softmax(dim=1) for logits in (teachers, own))
    return (log_teacher.exp() * (log_teacher - log_own)).sum(dim=1)
