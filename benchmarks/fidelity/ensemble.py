"""An ensemble from its cache: means over members kept apart, against the means of the members' own logits."""

from __future__ import annotations

__all__ = ["MEMBERS", "compare_ensemble"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.fidelity.lineup import named_specs
from benchmarks.fidelity.measures import TEMPERATURES
from benchmarks.fidelity.ours import Ours
from benchmarks.fidelity.peers import TinyViT
from benchmarks.fidelity.subjects import Subject, open_subject
from kdcache.soft_targets import Mean, SoftTargets, log_mean_probabilities

MEMBERS: Final = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
_MEANS: Final[tuple[Mean, ...]] = ("geometric", "arithmetic")


def compare_ensemble(folder: Path, *, share: float = 1.0) -> list[dict[str, Any]]:
    """Measure three members in one ensemble: a row for each way to keep them and each mean.

    Beside the members kept apart stand systems that keep one distribution for all: the arithmetic mean at
    temperature 1, exactly and as the top 100 of TinyViT, powered to other temperatures.
    """
    subjects = [open_subject(name, share=share) for name in MEMBERS]
    live = torch.stack([subject.held_out for subject in subjects], dim=1).double()
    truth = {
        mean: {at: log_mean_probabilities(live, temperature=at, mean=mean) for at in TEMPERATURES} for mean in _MEANS
    }
    lines = []
    for name, setting, spec in named_specs(live.shape[2]):
        if "samples" in name:  # sampled soft targets have no geometric mean
            continue
        members = [Ours(name, setting, spec, one.pilot, folder / name / f"{setting}-{one.name}") for one in subjects]
        kept = [one.encode(subject.held_out)["codes"] for one, subject in zip(members, subjects, strict=True)]
        soft = SoftTargets(tuple(kept), tuple(one.decoder for one in members), MEMBERS)
        row_bytes = sum(one.sizes({"codes": codes}).row_bytes for one, codes in zip(members, kept, strict=True))
        for mean in _MEANS:
            stored = {at: soft.log_probabilities(at, mean=mean).double() for at in TEMPERATURES}
            lines.append(_line(f"kdcache {name}, {setting}, members apart", mean, row_bytes, truth[mean], stored))
    return lines + _single(subjects[0], live, truth["arithmetic"], folder)


def _single(
    subject: Subject, live: Float64[Tensor, "row teacher class"], truth: Mapping[float, Tensor], folder: Path
) -> list[dict[str, Any]]:
    """Give the lines of systems that keep one distribution for the whole ensemble."""
    mixture = log_mean_probabilities(live, temperature=1.0, mean="arithmetic")
    exact = {at: (mixture / at).log_softmax(dim=1) for at in TEMPERATURES}
    peer = TinyViT(subject.num_classes)
    kept = peer.encode(mixture.float())
    row_bytes = peer.write(kept, folder / "mixture") / len(mixture)
    stored = {at: peer.log_soft_targets(kept, at) for at in TEMPERATURES}
    return [
        _line("mean at T=1, float32, powered", "arithmetic", 4.0 * subject.num_classes, truth, exact),
        _line(f"mean at T=1 in TinyViT, {peer.setting}, powered", "arithmetic", row_bytes, truth, stored),
    ]


def _line(
    what: str, mean: str, row_bytes: float, truth: Mapping[float, Tensor], stored: Mapping[float, Tensor]
) -> dict[str, Any]:
    divergences = {at: (truth[at].exp() * (truth[at] - stored[at])).sum(dim=1) for at in TEMPERATURES}
    return {
        "what": what,
        "mean": mean,
        "row_bytes": row_bytes,
        "kl_mean": {f"{at:g}": float(divergences[at].mean()) for at in TEMPERATURES},
        "kl_max": {f"{at:g}": float(divergences[at].max()) for at in TEMPERATURES},
    }
