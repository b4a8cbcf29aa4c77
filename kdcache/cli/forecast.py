"""What `kdcache plan` shows: the choice, everything measured beside it, the forecast, and advice in words."""

from __future__ import annotations

__all__ = ["advice", "forecast_as_json", "memory_in_words", "plot_forecast", "print_forecast"]

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kdcache.build import Forecast, TeacherForecast
from kdcache.build.candidates import MIN_ROWS_FOR_BASIS
from kdcache.build.curve import WIDE_BASIS_BYTES, break_even_rows, is_uint8_codes, spectral_parameter_bytes
from kdcache.build.memory import TaskMemory
from kdcache.build.pilot import RatePoint
from kdcache.cli.output import console, print_json, readable_bytes, readable_seconds, say, sizes_in_words
from kdcache.documents import (
    CertificateDocument,
    CodecSpec,
    Codes,
    Lossless,
    RateTarget,
    Spectral,
    TopK,
    codec_in_words,
)
from kdcache.report import RatePoints, rate_curves

TEMPERATURES = (1.0, 2.0, 4.0)
"""At which fidelity is shown: those that `max_kl` is about."""
TOP_K = (64, 100)
"""What a basis is held against: ids and float16 values of so many classes, 4 bytes each."""
TOP_K_BYTES = 4
FEW_CLASSES = 32
MANY_CLASSES = 256


def advice(
    num_classes: int, num_rows: int, *, rank: int | None = None, codes_bytes_per_row: float | None = None
) -> tuple[str, ...]:
    """Say in words what the numbers of a build mean for its codec; nothing where nothing stands out.

    Parameters
    ----------
    num_classes, num_rows : int
        Classes of a row, and rows of a teacher.
    rank : int, optional
        Components of the basis; absent where none was fitted.
    codes_bytes_per_row : float, optional
        Of uint8 codes as measured; classes + 1, their size before compression, where absent.

    Returns
    -------
    tuple of str
        Sentences.

    Examples
    --------
    >>> print(*advice(10, 60_000))
    Few classes: uint8 codes keep a whole row in at most 11 bytes; a basis saves a few bytes a row at best.
    """
    codes_bytes = num_classes + 1 if codes_bytes_per_row is None else codes_bytes_per_row
    found = []
    if num_classes <= FEW_CLASSES:
        found.append(
            f"Few classes: uint8 codes keep a whole row in at most {num_classes + 1} bytes; a basis saves a few bytes "
            "a row at best."
        )
    if rank is not None:
        found += _advice_on_basis(num_classes, num_rows, rank, codes_bytes)
    elif num_rows < MIN_ROWS_FOR_BASIS:
        found.append(f"Few rows: {num_rows} are too few to fit a basis to; it takes {MIN_ROWS_FOR_BASIS}.")
    return tuple(found)


def _advice_on_basis(num_classes: int, num_rows: int, rank: int, codes_bytes: float) -> Iterator[str]:
    num_bytes = spectral_parameter_bytes(num_classes, rank)
    if num_bytes > num_rows * codes_bytes:
        yield (
            f"Few rows: a basis costs {num_bytes / num_rows:,.4g} bytes a row when {num_rows:,} rows share it, more "
            f"than all of a row's uint8 codes ({codes_bytes:,.4g})."
        )
    if num_bytes > WIDE_BASIS_BYTES:
        elements = num_classes * rank
        yield (
            f"Wide teacher: its basis, {rank:,} components x {num_classes:,} classes, takes "
            f"{readable_bytes(num_bytes)} on disk, and in every process that reads the cache "
            f"{readable_bytes(4 * elements)} in float32 or {readable_bytes(2 * elements)} in bfloat16; "
            f"rank={rank // 2} halves that, rank={rank // 4} quarters it."
        )


def print_forecast(forecast: Forecast, *, json: bool) -> None:
    """Print a forecast, for people or for machines."""
    if json:
        print_json(forecast_as_json(forecast))
        return
    cache = forecast.plan.cache
    say(
        f"[bold]{escape(forecast.address)}[/bold]: {cache.num_examples:,} examples, "
        f"{forecast.num_stored_rows:,} rows of {cache.num_classes:,} classes; "
        f"{cache.num_shards:,} shards of {cache.shard_rows:,} rows a teacher"
    )
    console.print(_choices(forecast))
    if any(len(item.points) > 1 for item in forecast.teachers):
        console.print(_measured(forecast))
    if any(_break_even(forecast, item) for item in forecast.teachers):
        console.print(_paid_back(forecast))
    for sentence in _grouped_advice(forecast):
        say(escape(sentence))
    sizes = sizes_in_words(
        codes=forecast.num_bytes - sum(item.parameter_bytes for item in forecast.teachers),
        parameters=sum(item.parameter_bytes for item in forecast.teachers),
        num_rows=forecast.num_stored_rows,
        num_teachers=max(1, len(forecast.teachers)),
    )
    say(f"forecast: {sizes}; {readable_seconds(forecast.seconds)} in this process; nothing was written")
    stated = [item.memory for item in forecast.teachers if item.memory is not None]
    if stated:
        say(memory_in_words(max(stated, key=lambda memory: memory.task_bytes)))


def memory_in_words(memory: TaskMemory) -> str:
    """Write what a process that runs tasks takes at its peak."""
    return (
        f"memory: a process that runs tasks takes up to {readable_bytes(memory.task_bytes)} beside its imports (torch: "
        f"about 250 MB) and its teacher's weights and activations (inputs {readable_bytes(memory.input_bytes)}, "
        f"logits {readable_bytes(memory.logits_bytes)}, coding {readable_bytes(memory.coding_bytes)}, "
        f"encoded shards {readable_bytes(memory.encoded_bytes)}, parameters {readable_bytes(memory.parameter_bytes)}); "
        f"the pilot's logits {readable_bytes(memory.pilot_bytes)}"
    )


def forecast_as_json(forecast: Forecast) -> dict[str, Any]:
    """Give all that a forecast says, as JSON holds it."""
    return {
        "address": forecast.address,
        "plan": forecast.plan.to_mapping(),
        "num_bytes": forecast.num_bytes,
        "seconds": forecast.seconds,
        "hours": forecast.seconds / 3600,
        "teachers": [_teacher_as_json(forecast, item) for item in forecast.teachers],
    }


def memory_as_json(memory: TaskMemory) -> dict[str, int]:
    """Give what a task takes, as JSON holds it."""
    return {**dataclasses.asdict(memory), "task_bytes": memory.task_bytes}


def plot_forecast(forecast: Forecast, path: Path) -> Path:
    """Draw bytes a row against KL, a panel a teacher, as PNG or SVG by the path's suffix; see `rate_curves`."""
    return rate_curves(
        {item.name: [_drawn(point) for point in item.points] for item in forecast.teachers}, path,
        title="What a row costs and keeps",
    )  # fmt: skip


def _teacher_as_json(forecast: Forecast, item: TeacherForecast) -> dict[str, Any]:
    num_rows = forecast.num_stored_rows
    return {
        "name": item.name,
        "codec": item.codec.to_mapping(),
        "num_pilot_rows": item.num_pilot_rows,
        "bytes_per_row": item.bytes_per_row,
        "parameter_bytes": item.parameter_bytes,
        "num_bytes": item.bytes_per_row * num_rows + item.parameter_bytes,
        "inference_seconds_per_row": item.inference_seconds_per_row,
        "encode_seconds_per_row": item.encode_seconds_per_row,
        "certificate": item.certificate.to_mapping(),
        "points": [
            {
                "codec": point.codec.to_mapping(),
                "bytes_per_row": point.bytes_per_row,
                "parameter_bytes": point.parameter_bytes,
                "num_bytes": point.bytes_over(num_rows),
                "certificate": point.certificate.to_mapping(),
                "is_choice": point.is_choice,
            }
            for point in item.points
        ],
        "break_even_rows": _break_even(forecast, item),
        "advice": list(_advice_of(forecast, item)),
        "memory": None if item.memory is None else memory_as_json(item.memory),
    }


def _choices(forecast: Forecast) -> Table:
    kl_headers = [f"KL at\n{temperature:g}" for temperature in TEMPERATURES]
    table = _table("chosen", ["bytes\na row", "para-\nmeters", *kl_headers, "p99\nKL", "max\nKL", "rows/s"])
    for item in forecast.teachers:
        kl = _kl(item.certificate)
        table.add_row(
            escape(item.name),
            codec_in_words(item.codec),
            f"{item.bytes_per_row:,.4g}",
            readable_bytes(item.parameter_bytes),
            *(f"{mean:.2g}" for mean, _, _ in kl.values()),
            f"{max(p99 for _, p99, _ in kl.values()):.2g}",
            f"{max(largest for _, _, largest in kl.values()):.2g}",
            f"{1 / max(item.inference_seconds_per_row, item.encode_seconds_per_row, 1e-9):,.0f}",
        )
    return table


def _table(title: str, headers: list[str]) -> Table:
    """Make a table whose figures stay whole on narrow terminals; names and codecs are folded instead."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("teacher", overflow="fold")
    table.add_column("codec", overflow="fold")
    for header in headers:
        table.add_column(header, no_wrap=True)
    return table


def _kl(certificate: CertificateDocument) -> dict[float, tuple[float, float, float]]:
    """Give mean, p99 and largest KL by temperature, at those that are shown."""
    found = zip(
        certificate.temperatures, certificate.mean_kl, certificate.kl_histograms, certificate.max_kl, strict=True
    )
    kl = {
        temperature: (mean, rows.quantile(0.99, largest=largest), largest) for temperature, mean, rows, largest in found
    }
    return {temperature: kl[temperature] for temperature in TEMPERATURES}


def _measured(forecast: Forecast) -> Table:
    kl_headers = [f"KL at\n{temperature:g}" for temperature in TEMPERATURES]
    table = _table("measured", ["bytes\na row", "in all", *kl_headers, ""])
    for item in forecast.teachers:
        for index, point in enumerate(sorted(item.points, key=lambda point: point.bytes_per_row)):
            table.add_row(
                "" if index else escape(item.name),
                codec_in_words(point.codec),
                f"{point.bytes_per_row:,.4g}",
                readable_bytes(point.bytes_over(forecast.num_stored_rows)),
                *(f"{mean:.2g}" for mean, _, _ in _kl(point.certificate).values()),
                "chosen" if point.is_choice else "",
                style="bold" if point.is_choice else None,
            )
    return table


def _basis_point(item: TeacherForecast) -> RatePoint | None:
    """Give the choice where it is a basis, else the first basis that was measured."""
    points = [point for point in item.points if isinstance(point.codec, Spectral)]
    return next((point for point in points if point.is_choice), points[0] if points else None)


def _codes_point(item: TeacherForecast) -> RatePoint | None:
    return next((point for point in item.points if is_uint8_codes(point.codec)), None)


def _break_even(forecast: Forecast, item: TeacherForecast) -> dict[str, int | None] | None:
    """Give the rows from which the basis is paid back, by what it is held against; None where there is none."""
    basis, codes = _basis_point(item), _codes_point(item)
    if basis is None:
        return None
    against = {f"plain top-{k}": (float(TOP_K_BYTES * k), 0) for k in TOP_K if k < forecast.plan.cache.num_classes}
    if codes is not None:
        against["uint8 codes"] = (codes.bytes_per_row, codes.parameter_bytes)
    return {
        name: break_even_rows(
            basis.parameter_bytes, basis.bytes_per_row, other_bytes_per_row=row, other_parameter_bytes=parameters
        )
        for name, (row, parameters) in against.items()
    }


def _paid_back(forecast: Forecast) -> Table:
    found = {item.name: _break_even(forecast, item) for item in forecast.teachers}
    paid = {name: counts for name, counts in found.items() if counts}
    columns = list(dict.fromkeys(column for counts in paid.values() for column in counts))
    table = Table(
        "teacher",
        *columns,
        title="break-even rows of the basis against",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, counts in paid.items():
        table.add_row(escape(name), *(_break_even_in_words(counts, column) for column in columns))
    return table


def _break_even_in_words(counts: Mapping[str, int | None], column: str) -> str:
    if column not in counts:
        return "-"  # not measured: the codec cannot hold this teacher's logits
    count = counts[column]
    return "never" if count is None else f"{count:,}"


def _grouped_advice(forecast: Forecast) -> Iterator[str]:
    """Give each sentence once, with the teachers that it is about where it is not about all."""
    about: dict[str, list[str]] = {}
    for item in forecast.teachers:
        for sentence in _advice_of(forecast, item):
            about.setdefault(sentence, []).append(item.name)
    for sentence, names in about.items():
        yield sentence if len(names) == len(forecast.teachers) else f"{', '.join(names)}: {sentence}"


def _advice_of(forecast: Forecast, item: TeacherForecast) -> tuple[str, ...]:
    basis, codes = _basis_point(item), _codes_point(item)
    rank = basis.codec.rank if basis is not None and isinstance(basis.codec, Spectral) else None
    cache, planned = forecast.plan.cache, forecast.plan.codec
    found = advice(
        cache.num_classes,
        forecast.num_stored_rows,
        rank=rank,
        codes_bytes_per_row=None if codes is None else codes.bytes_per_row,
    )
    if isinstance(planned, Codes | Lossless) and cache.num_classes >= MANY_CLASSES:
        found += ("Many classes: --max-kl 0.01, say, measures whether a basis takes less.",)
    if isinstance(planned, RateTarget) and item.num_other_masks:
        told = (
            f"Masks differ: {item.num_other_masks:,} of {item.num_pilot_rows:,} rows of the pilot mask (-inf) other "
            "classes than most rows do. A basis and class means keep one mask for all rows, so that only codecs of a "
            "byte a class and more are left. Mask the same classes in every row, or none, where the teacher allows it."
        )
        found += (told,)
    return found


def _drawn(point: RatePoint) -> RatePoints:
    return RatePoints(
        series=_series(point.codec),
        bytes_per_row=point.bytes_per_row,
        kl={temperature: mean for temperature, (mean, _, _) in _kl(point.certificate).items()},
        is_choice=point.is_choice,
    )


def _series(spec: CodecSpec) -> str:
    if isinstance(spec, Spectral):
        return "basis"
    return f"top-k, tail {spec.tail}" if isinstance(spec, TopK) else codec_in_words(spec)
