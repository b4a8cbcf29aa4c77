"""The demo: run ten teachers once, and train many students from what they said.

    make demo, or python -m jobs.demo in the repository's folder

It goes on where it was stopped, and a second run is quick. The exit code is 1 where an effect that the demo is to show
does not hold. The same, step by step:

    python -m jobs.demo.train_teachers      ten networks that differ in their seed alone
    kdcache plan jobs/demo/job.toml         what the cache will take; writes nothing
    kdcache build jobs/demo/job.toml        run the teachers once
    kdcache info jobs/demo/job.toml         what the cache holds, and its stated error
    kdcache train jobs/demo/job.toml        train the students from the cache, with no teacher in sight
"""

from __future__ import annotations

__all__ = ["main", "run"]

import dataclasses
import itertools
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final

import torch
import typer
from rich.table import Table

from jobs.demo.data import test_set
from jobs.demo.summary import Effect, Row, find_effects, score_ensemble, score_left_out, score_students, written
from jobs.demo.train_teachers import JOB, Recipe, train_teachers
from kdcache import SoftTargetCache, TransferSet, build_cache
from kdcache.build import BuildProgress, SourcedTeacher, build_job
from kdcache.cli.output import console, exit_code_of, print_error, print_json, progress_bar, readable_bytes
from kdcache.errors import KdcacheError
from kdcache.jobs import LoadedJob, read_job
from kdcache.report import Bar, bars
from kdcache.students import StudentResult, train_job

ALL, FEW, WITHOUT = "all examples", "100 examples", "all but 3s"
"""The job's student sweeps, as they are named in the table; draws of examples are counted in the sweep's name."""
_EFFECT_MISSING: Final = 1
"""Exit code where an effect does not hold; kdcache's own begin at 2."""
_MADE: Final = ("teachers", "cache", "test-cache", "students", "build.json", "demo.png", "demo.svg")
"""What the demo makes below its folder `out`."""
_NUM_THREADS: Final = 1
"""Networks this small gain little from a second, which wastes much where it has to wait for other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out of a run.

    Parameters
    ----------
    rows : list of Row
    effects : list of Effect
    cache : mapping
        What the cache costs, and its stated error.
    picture : Path
    """

    rows: list[Row]
    effects: list[Effect]
    cache: dict[str, Any]
    picture: Path


def run(loaded: LoadedJob, recipe: Recipe) -> Outcome:
    """Do all steps of the demo that are not done yet, below the folder `out` beside the job file."""
    out = loaded.folder / "out"
    with progress_bar("teachers") as show:
        train_teachers(loaded, recipe, progress=show)
    cache = _build(loaded, out)
    with progress_bar("batches") as show:
        results = train_job(
            loaded, out=out, checkpoint_epochs=20, progress=lambda done, total, text: show(text, done, total)
        )
    by_group: dict[str, list[StudentResult]] = {}
    for result in results:
        by_group.setdefault(re.sub(r"-\d$", "", result.sweep).replace("-", " "), []).append(result)
    teachers = score_ensemble(_build_test_cache(loaded, out))
    everything = score_students(by_group[ALL], group=ALL)
    few = score_students(by_group[FEW], group=FEW)
    left_out = score_left_out(loaded, by_group[WITHOUT], group=WITHOUT)
    rows = [*teachers.values(), *everything.values(), *few.values(), *left_out.values()]
    (picture, _) = _draw(rows, out / "demo")
    effects = find_effects(teachers, everything, few, left_out)
    return Outcome(rows=rows, effects=effects, cache=_describe(cache, out), picture=picture)


def _build(loaded: LoadedJob, out: Path) -> SoftTargetCache:
    """Build the job's cache, as `kdcache build` does, and keep the time of it."""
    started, steps = time.perf_counter(), list[BuildProgress]()
    with progress_bar("rows") as show:

        def on_progress(step: BuildProgress) -> None:
            show(f"{step.stage} {step.teacher}", step.done_rows, step.total_rows)
            steps.append(step)

        cache = build_job(loaded, on_progress=on_progress)
    if steps:
        num_rows = steps[-1].done_rows - steps[0].done_rows
        rate = {"rows_per_second": num_rows / (time.perf_counter() - started)}
        (out / "build.json").write_text(json.dumps(rate), encoding="utf-8")
    return cache


def _build_test_cache(loaded: LoadedJob, out: Path) -> SoftTargetCache:
    """Cache the teachers' logits on the test set too, to score the ensemble; no student reads it."""
    inputs, labels = test_set()
    teachers = [SourcedTeacher(source, loaded.folder) for source in loaded.job.teachers]
    return build_cache(out / "test-cache", TransferSet.from_arrays(inputs, labels=labels), teachers)


def _describe(cache: SoftTargetCache, out: Path) -> dict[str, Any]:
    num_rows = cache.num_examples * len(cache.teachers)
    num_bytes = sum(teacher.num_bytes for teacher in cache.complete.teachers) if cache.complete else 0
    timing = out / "build.json"
    certificates = [cache.certificate(temperature) for temperature in (1.0, 2.0, 4.0, 8.0, 20.0)]
    return {
        "num_bytes": num_bytes,
        "bytes_per_row": num_bytes / num_rows,
        "float32_bytes_per_row": 4 * cache.num_classes,
        "largest_mean_kl": max(certificate.mean_kl or 0 for certificate in certificates),
        "largest_kl": max(certificate.max_kl or 0 for certificate in certificates),
        "build_rows_per_second": json.loads(timing.read_text())["rows_per_second"] if timing.exists() else None,
    }


def _draw(rows: list[Row], path: Path) -> tuple[Path, ...]:
    drawn = [
        Bar(
            label=f"{row.group}: {row.name}",
            value=fmean(row.errors),
            low=min(row.errors),
            high=max(row.errors),
            emphasis=row.name.startswith("soft"),
        )
        for row in rows
    ]
    unit = "test error (%): mean, best to worst run"
    return bars(drawn, path, title="Ten teachers, one cache, many students", unit=unit, number_format=".1f")


def _print(outcome: Outcome) -> None:
    table = Table("", "", "test error (%)", "on 3s (%)", "runs", title="mean ± standard deviation over runs")
    for group, rows in itertools.groupby(outcome.rows, key=lambda row: row.group):
        table.add_section()
        for index, row in enumerate(rows):
            left_out = written(row.left_out_errors) if row.left_out_errors else ""
            name = group if index == 0 else ""
            table.add_row(name, row.name, written(row.errors), left_out, str(len(row.errors)))
    console.print(table)
    cache = outcome.cache
    console.print(
        f"cache: {readable_bytes(cache['num_bytes'])}, {cache['bytes_per_row']:.1f} bytes a row and teacher (float32 "
        f"takes {cache['float32_bytes_per_row']}); KL from the teachers' soft targets at any of the five temperatures "
        f"{cache['largest_mean_kl']:.1g} nats on average, {cache['largest_kl']:.1g} at most"
        + (f"; built at {rate:,.0f} rows/s" if (rate := cache["build_rows_per_second"]) else "")
    )
    for effect in outcome.effects:
        console.print(("[green]" if effect.holds else "[bold red]") + str(effect) + "[/]", highlight=False)
    console.print(f"picture: {outcome.picture}", soft_wrap=True)


def main(
    *,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what stands and start anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    job: Annotated[Path, typer.Option(help="Another job file of this kind; all is written to `out` beside it.")] = JOB,
    teacher_epochs: Annotated[int, typer.Option(help="How long teachers are trained.")] = Recipe.num_epochs,
) -> None:
    """Run ten teachers once, and train many students from what they said."""
    started = time.perf_counter()
    torch.set_num_threads(_NUM_THREADS)
    try:
        loaded = read_job(job)
        if fresh:
            _delete(loaded.folder / "out")
        outcome = run(loaded, Recipe(num_epochs=teacher_epochs))
    except KdcacheError as error:
        print_error(error, as_json=as_json)
        raise typer.Exit(exit_code_of(error)) from error
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time()
    if as_json:
        times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        print_json({**dataclasses.asdict(outcome), "picture": str(outcome.picture), **times})
    else:
        _print(outcome)
        console.print(f"{seconds:.0f} s, {cpu_seconds:.0f} s of processor time")
    if not all(effect.holds for effect in outcome.effects):
        raise typer.Exit(_EFFECT_MISSING)


def _delete(out: Path) -> None:
    for name in _MADE:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
