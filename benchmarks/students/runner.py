"""The whole comparison: subjects, arms, students, and their scores on disk."""

from __future__ import annotations

__all__ = ["GPU_RESULTS", "OPENERS", "PLANS", "QUICK", "RESULTS", "compare", "run", "run_transformer", "write"]

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.fidelity.report import filled
from benchmarks.students.arms import Arm, open_arms
from benchmarks.students.image import open_image
from benchmarks.students.lm import open_lm
from benchmarks.students.report import all_tables, draw, overview
from benchmarks.students.scores import score
from benchmarks.students.subjects import Plan, Subject
from benchmarks.students.training import train
from benchmarks.students.window_runner import run_windows
from benchmarks.students.windows import WindowPlan, open_windows

DOCS: Final = Path(__file__).parents[2] / "docs"
RESULTS: Final = DOCS / "results" / "students-fidelity.json"
PICTURE: Final = DOCS / "images" / "students-fidelity.png"
GPU_RESULTS: Final = DOCS / "results" / "students-fidelity-gpu.json"
_PICTURES: Final = {RESULTS: PICTURE, GPU_RESULTS: DOCS / "images" / "students-fidelity-gpu.png"}
PAGE: Final = DOCS / "students-fidelity.md"

OPENERS: Final[Mapping[str, Callable[[Plan], Subject]]] = {"lm": open_lm, "image": open_image}
PLANS: Final = {
    "lm": Plan(num_train=8192, num_held_out=2048, steps=300, learning_rate=0.01, seeds=3),
    "image": Plan(num_train=3200, num_held_out=800, steps=400, learning_rate=0.003, seeds=5),
}
QUICK: Final = {
    "lm": Plan(num_train=512, num_held_out=256, steps=20, learning_rate=0.01, seeds=2, temperatures=(1.0, 2.0)),
    "image": Plan(num_train=3200, num_held_out=800, steps=40, learning_rate=0.003, seeds=2, temperatures=(1.0, 2.0)),
}


def run(
    names: Sequence[str] = tuple(OPENERS), *, plans: Mapping[str, Plan] = PLANS, results: Path = RESULTS
) -> list[dict[str, Any]]:
    """Train the students of every subject; after each arm, keep the figures so far, and after each subject draw them.

    Parameters
    ----------
    names : sequence of str
        Of `OPENERS`. What the file says of other subjects stays.
    plans : mapping of str to Plan
    results : Path
        The JSON file. Where it is the usual one, the picture goes to docs/images and the tables into the page; else the
        picture lies beside it.

    Returns
    -------
    list of dict
        The rows of a printed table: each arm's KL beside the full logits'.
    """
    document = json.loads(results.read_text()) if results.exists() else {"subjects": {}}
    document["made_on"] = {
        "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()
    }  # fmt: skip
    for name in names:
        for found in _progress(compare(OPENERS[name], plans[name])):
            document["subjects"][name] = found
            _keep(document, results)
        write(document, results)
    return overview({name: document["subjects"][name] for name in names})


def run_transformer(
    plan: WindowPlan, device: torch.device, *, results: Path = GPU_RESULTS, minutes: float = math.inf
) -> list[dict[str, Any]]:
    """Train the students that read windows, seed by seed, and keep the figures after each.

    Parameters
    ----------
    plan : WindowPlan
    device : torch.device
    results : Path
        The JSON file, picture and page as of `run`. Seeds that it holds already are not trained again.
    minutes : float
        From now; a seed that would not be done by then is not begun. Another run goes on from there.

    Returns
    -------
    list of dict
        As of `run`.
    """
    until = time.monotonic() + 60 * minutes
    document = json.loads(results.read_text()) if results.exists() else {"subjects": {}}
    console = Console(stderr=True, width=160, highlight=False)
    subject = open_windows(plan, device)
    console.print(f"{subject.train.num_rows} rows, {subject.forward_tokens_per_second:.0f} tokens a second")
    for found in run_windows(subject, plan, found=document["subjects"].get(subject.name), until_seconds=until):
        document["subjects"][subject.name] = found
        _keep(document, results)
        console.print(f"{len(found['arms'][0]['students'])} students an arm, {found['seconds_a_seed']:.0f} s a seed")
    write(document, results)
    return overview(document["subjects"])


def compare(opener: Callable[[Plan], Subject], plan: Plan) -> Iterator[dict[str, Any]]:
    """Train a subject's students arm by arm; after each arm, give the figures so far."""
    start = time.perf_counter()
    subject = opener(plan)
    found: dict[str, Any] = {
        "title": subject.title, "num_classes": subject.num_classes, "train_rows": len(subject.train_logits),
        "held_out_rows": len(subject.held_out_logits), "plan": asdict(plan), "arms": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        for arm in open_arms(subject, plan.temperatures, Path(folder)):
            found["arms"].append(
                {
                    "name": arm.name, "is_ours": arm.is_ours, "row_bytes": arm.row_bytes,
                    "students": list(_students(subject, arm, plan)),
                }
            )  # fmt: skip
            yield found | {"seconds": time.perf_counter() - start}


def write(document: dict[str, Any], results: Path) -> None:
    """Write the figures as JSON and draw them; the usual files' tables go into docs/students-fidelity.md too."""
    _keep(document, results)
    draw(document["subjects"], _PICTURES.get(results, results.with_suffix(".png")))
    if results in _PICTURES:
        PAGE.write_text(filled(PAGE.read_text(), all_tables(document["subjects"])))


def _keep(document: dict[str, Any], results: Path) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(_rounded(document), indent=1) + "\n")


def _students(subject: Subject, arm: Arm, plan: Plan) -> Iterator[dict[str, Any]]:
    for temperature in plan.temperatures:
        if arm.temperature not in {None, temperature}:
            continue
        soft_targets = arm.soft_targets(temperature)
        for seed in range(plan.seeds):
            student = train(subject, soft_targets, temperature, plan, seed)
            yield {"temperature": temperature, "seed": seed, **asdict(score(student, subject, temperature))}


def _progress(found: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    console = Console(stderr=True, width=160, highlight=False)
    for one in found:
        arm = one["arms"][-1]
        students = f"{len(arm['students'])} students, {arm['row_bytes']:.0f} bytes a row"
        console.print(f"{one['title']}: {arm['name']}, {students}, {one['seconds']:.0f} s so far")
        yield one


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
