"""`kdcache train`."""

from __future__ import annotations

__all__ = ["train"]

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kdcache import jobs
from kdcache.cli.output import Json, Threads, console, print_json, progress_bar, say, use_threads
from kdcache.errors import MissingExtraError

if TYPE_CHECKING:
    from kdcache.jobs import LoadedJob
    from kdcache.students import Scores, StudentResult, StudentSettings

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A TOML job file.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of metrics, checkpoints, students and pictures.", show_default="out beside JOB"),
]
Only = Annotated[list[str] | None, typer.Option(metavar="SWEEP", help="Train only this sweep; may be repeated.")]
Device = Annotated[str, typer.Option(help="Where students train; auto takes cuda where there is one.")]


def train(
    job: JobFile,
    out: Out = None,
    only: Only = None,
    device: Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Drop what stands there, start anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the students, train none.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train the job's students from its cache alone, many side by side; goes on where it was stopped."""
    from kdcache.students import train_job  # imported here: the other commands need no training

    use_threads(threads)
    loaded = jobs.read_job(job)
    folder = out or loaded.folder / "out"
    if dry_run:
        _list_students(loaded, only, json=json)
        return
    with progress_bar("batches") as show:
        results = train_job(
            loaded,
            out=folder,
            only=only,
            device=device,
            resume=not restart,
            progress=lambda done, total, text: show(text, done, total),
        )
    pictures = _draw(folder, sorted({result.sweep for result in results}))
    if json:
        print_json([_as_json(result) for result in results])
        return
    table = Table("sweep", "temperature", "soft weight", "seed", "test error", "with bias correction")
    for result in results:
        corrected = _percent(result.corrected_test)
        table.add_row(escape(result.sweep), *_columns(result.settings), _percent(result.test), corrected)
    console.print(table)
    say(f"metrics, students and pictures: {escape(str(folder / 'students'))}")
    for picture in pictures:
        say(f"picture: {escape(str(picture))}")


def _list_students(loaded: LoadedJob, only: list[str] | None, *, json: bool) -> None:
    from kdcache.students import line_up  # as above

    listed = [
        (sweep, settings)
        for sweep in loaded.job.students
        if only is None or sweep.name in only
        for settings in line_up(sweep)
    ]
    if json:
        print_json([{"sweep": sweep.name, **dataclasses.asdict(settings)} for sweep, settings in listed])
        return
    table = Table("sweep", "temperature", "soft weight", "seed", "epochs")
    for sweep, settings in listed:
        table.add_row(escape(sweep.name), *_columns(settings), str(sweep.epochs))
    console.print(table)
    say(f"{len(listed)} student(s); nothing was trained")


def _draw(folder: Path, sweeps: list[str]) -> list[Path]:
    """Draw each sweep that was trained; without matplotlib say how to get pictures."""
    from kdcache.report import student_curves  # as above

    students = folder / "students"
    try:
        return [
            picture
            for sweep in sweeps
            for picture in student_curves(
                [students / sweep / "metrics.jsonl"], students / sweep / "curves", title=sweep
            )
            if picture.suffix == ".png"
        ]
    except MissingExtraError as error:
        say(f"no picture was drawn: {escape(str(error))}")
        return []


def _columns(settings: StudentSettings) -> tuple[str, str, str]:
    temperature = "-" if settings.temperature is None else f"{settings.temperature:g}"
    return temperature, f"{settings.soft_weight:g}", str(settings.seed)


def _percent(scores: Scores | None) -> str:
    return "-" if scores is None else f"{100 * scores.error:.2f}%"


def _as_json(result: StudentResult) -> dict[str, Any]:
    mapping = dataclasses.asdict(result)
    return {**mapping, "weights": str(result.weights)}
