"""The comparison of students that read windows: every arm for one seed before the next, and the speeds on the way."""

from __future__ import annotations

__all__ = ["WINDOW_PLANS", "WindowQuestion", "made_on", "run_windows"]

import json
import math
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.students.kept_rows import BLOCK_ROWS, RowArm, Softener, open_row_arms, soften
from benchmarks.students.scores import score_rows, summarised
from benchmarks.students.speeds import encode_speeds, soften_speeds
from benchmarks.students.window_training import Gradient, Trainer, soft_gradient_at
from benchmarks.students.windows import TEXTS, WindowPlan, WindowSubject, now

WINDOW_PLANS: Final[Mapping[str, WindowPlan]] = {
    "full": WindowPlan(
        num_train_windows=(512, 256), num_held_out_windows=24, width=256, depth=4, num_heads=4, steps=400,
        batch_windows=4, learning_rates=(0.003,), seeds=3,
    ),
    "long": WindowPlan(
        num_train_windows=(1079, 969), num_held_out_windows=48, width=256, depth=4, num_heads=4, steps=1500,
        batch_windows=4, learning_rates=(0.001, 0.003), seeds=5,
    ),
    "quick": WindowPlan(
        num_train_windows=(8, 4), num_held_out_windows=1, width=32, depth=1, num_heads=2, steps=4, batch_windows=2,
        learning_rates=(0.001, 0.003), seeds=2, temperatures=(1.0, 2.0),
    ),
}  # fmt: skip
_SCORED_WINDOWS: Final = 8


@dataclass(frozen=True, eq=False)
class WindowQuestion:
    """A subject with all its arms, ready to train students.

    Parameters
    ----------
    subject : WindowSubject
    plan : WindowPlan
    arms : list of RowArm
        The full logits first.
    trainer : Trainer
    """

    subject: WindowSubject
    plan: WindowPlan
    arms: Sequence[RowArm]
    trainer: Trainer

    @classmethod
    def of(cls, subject: WindowSubject, plan: WindowPlan, folder: Path) -> WindowQuestion:
        """Keep the rows in every way."""
        softener, gradient = _kernels(subject.device)
        arms = list(open_row_arms(subject, plan.temperatures, folder, softener))
        return cls(subject, plan, arms, Trainer(subject, plan, gradient))

    def rates(self) -> dict[str, float]:
        """Try the learning rates with full logits at temperature 1, on a seed of its own: KL by rate."""
        tried = {}
        for rate in self.plan.learning_rates:
            self.trainer.train(self.arms[0], 1.0, self.plan.seeds, rate)
            tried[f"{rate:g}"] = self.scores(1.0)["kl"]
        return tried

    def students(self, seed: int, learning_rate: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """Train a student of a seed for every arm and temperature; give each arm's place and its student's scores."""
        for temperature in self.plan.temperatures:
            for place, arm in enumerate(self.arms):
                if arm.temperature in {None, temperature}:
                    self.trainer.train(arm, temperature, seed, learning_rate)
                    yield place, {"temperature": temperature, "seed": seed, **self.scores(temperature)}

    @torch.no_grad()
    def scores(self, temperature: float) -> dict[str, float]:
        """Measure the student that was trained last, in float32: over all rows held out, and KL by text."""
        held_out, student = self.subject.held_out, self.trainer.student
        rows = [self._rows(student, start, temperature) for start in range(0, len(held_out), _SCORED_WINDOWS)]
        columns = {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}
        text = held_out.text.repeat_interleave(held_out.tokens.shape[1]).cpu()
        by_text = {f"kl_{kind}": float(columns["kl"][text == place].mean()) for place, kind in enumerate(TEXTS)}
        return asdict(summarised(columns, held_out.following.flatten().cpu())) | by_text

    def _rows(self, student: nn.Module, start: int, temperature: float) -> dict[str, Tensor]:
        held_out = self.subject.held_out
        windows = slice(start, start + _SCORED_WINDOWS)
        tokens, length = held_out.tokens[windows], held_out.tokens.shape[1]
        hidden = held_out.hidden[start * length : start * length + tokens.numel()]
        labels = held_out.following[windows].flatten()
        return score_rows(student(tokens).flatten(0, 1), self.subject.logits(hidden), temperature, labels)


def run_windows(
    subject: WindowSubject, plan: WindowPlan, *, found: Mapping[str, Any] | None = None, until_seconds: float = math.inf
) -> Iterator[dict[str, Any]]:
    """Train students seed by seed; after each seed, give the figures so far.

    Parameters
    ----------
    subject : WindowSubject
    plan : WindowPlan
    found : mapping, optional
        What an earlier run of the same plan gave: its seeds are not trained again.
    until_seconds : float
        By `time.monotonic`, when the last seed must be done; one that would not be is not begun.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        question = WindowQuestion.of(subject, plan, Path(folder))
        done = found if found is not None and _same_plan(found, plan) else _described(question)
        document = {**done, "arms": [{**arm, "students": list(arm["students"])} for arm in done["arms"]]}
        seeds = {one["seed"] for one in document["arms"][0]["students"]}
        rate = min(document["rates_tried"], key=document["rates_tried"].__getitem__)
        taken = 0.0
        for seed in sorted(set(range(plan.seeds)) - seeds):
            start = monotonic()
            if start + taken > until_seconds:
                return
            for place, student in question.students(seed, float(rate)):
                document["arms"][place]["students"].append(student)
            taken = monotonic() - start
            yield document | {"seconds_a_seed": taken}


def _described(question: WindowQuestion) -> dict[str, Any]:
    subject, plan = question.subject, question.plan
    start = now(subject.device)
    tried = question.rates()
    trained = plan.steps * plan.batch_windows * subject.train.tokens.shape[1] * len(tried)
    seconds = now(subject.device) - start
    return {
        "title": subject.title, "num_classes": subject.num_classes, "train_rows": subject.train.num_rows,
        "held_out_rows": subject.held_out.num_rows, "plan": asdict(plan), "rates_tried": tried,
        "student_parameters": sum(one.numel() for one in question.trainer.student.parameters()),
        "made_on": made_on(subject.device),
        "speeds": [
            {"what": "teacher's forward pass", "rows_per_second": subject.forward_tokens_per_second},
            *encode_speeds(subject, question.arms, block_rows=BLOCK_ROWS),
            *soften_speeds(question.arms, subject, plan),
            {"what": "training from full logits", "rows_per_second": trained / seconds},
        ],
        "arms": [
            {"name": arm.name, "is_ours": arm.is_ours, "row_bytes": arm.row_bytes, "students": []}
            for arm in question.arms
        ],
    }  # fmt: skip


def _same_plan(found: Mapping[str, Any], plan: WindowPlan) -> bool:
    return bool(found["plan"] == json.loads(json.dumps(asdict(plan))))  # lists for tuples


def made_on(device: torch.device) -> dict[str, Any]:
    """Say what the figures were made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "device": name, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _kernels(device: torch.device) -> tuple[Softener, Gradient]:
    """Compile what passes over whole rows, where a GPU would else pass many times."""
    if device.type != "cuda":
        return soften, soft_gradient_at
    return torch.compile(soften, dynamic=False), torch.compile(soft_gradient_at, dynamic=False)
