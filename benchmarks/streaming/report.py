"""The figures as tables in Markdown, and as pictures."""

from __future__ import annotations

__all__ = ["all_tables", "draw", "filled"]

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.fidelity.report import filled

_COLOURS: Final = {"kdcache": "#0072B2", "control": "#999999", "package": "#E69F00"}
_SET_TITLES: Final = {
    "float16": "float16 logits", "codes": "uint8 codes", "coefficients": "spectral coefficients", "top-64": "top 64",
}  # fmt: skip
_ZARRS: Final = ("zarrs, windows of 4 shards", "zarrs, shard by shard")
_SAME_FILES: Final = (*_ZARRS, "zarr-python, windows of 4 shards", "tensorstore, windows of 4 shards")

Figures = Mapping[str, Any]


def all_tables(document: Figures) -> dict[str, str]:
    """Give every table of a results file, in Markdown, by name."""
    tables = {}
    for figures in document.get("read", []):
        tables[f"read {figures['name']}"] = reading_table(figures["lines"])
    if document.get("read"):
        tables["against zarrs"] = ratios_table(document["read"], _ZARRS, "better of zarrs")
        tables["on the same files"] = ratios_table(document["read"], _SAME_FILES, "best of all on the same files")
        tables["packages"] = packages_table(document["read"])
    if document.get("cold"):
        tables["cold"] = cold_table(document["cold"])
    if document.get("step"):
        tables["step"] = step_table(document["step"])
    if document.get("shuffle"):
        tables["shuffle"] = shuffle_table(document["shuffle"]["orders"])
        tables["shuffle students"] = students_table(document["shuffle"]["students"])
    return tables


def reading_table(lines: Sequence[Figures]) -> str:
    """Give the table of one row set: rates with their spread, first batch, memory, disk and lines."""
    header = [
        "read by", "rows/s", "of single rounds", "rows per CPU-second", "first batch, ms", "memory, MB", "on disk, MB",
        "lines",
    ]  # fmt: skip
    rows = []
    for line in lines:
        name = f"**{line['name']}**" if line["kind"] == "kdcache" else line["name"]
        if line["error"] is not None:
            rows.append([name, f"did not run: {line['error']}", *[""] * 5, str(line["user_lines"])])
            continue
        rates = line["rows_per_second"]
        rows.append(
            [
                name, _rate(statistics.median(rates)), f"{_rate(min(rates))} to {_rate(max(rates))}",
                _rate(statistics.median(line["rows_per_cpu_second"])), f"{1000 * line['first_batch_seconds']:,.1f}",
                f"{line['memory_bytes'] / 1e6:,.0f}", f"{line['disk_bytes'] / 1e6:,.0f}", str(line["user_lines"]),
            ]
        )  # fmt: skip
    return _markdown(header, rows)


def ratios_table(read: Sequence[Figures], baselines: Sequence[str] = _ZARRS, title: str = "better of zarrs") -> str:
    """Give rows per CPU-second of kdcache over the best of some contestants that read the same files."""
    header = ["rows", title, *_names(read, "kdcache")]
    rows = []
    for figures in read:
        rates = {
            line["name"]: statistics.median(line["rows_per_cpu_second"])
            for line in figures["lines"]
            if line["error"] is None
        }
        base = max((rates[name] for name in baselines if name in rates), default=None)
        if base is not None:
            ratios = [f"{rates[name] / base:.2f}" if name in rates else "" for name in header[2:]]
            rows.append([_SET_TITLES[figures["name"]], _rate(base), *ratios])
    return _markdown(header, rows)


def packages_table(read: Sequence[Figures]) -> str:
    """Give who took part, in which version, and what is to be known of it."""
    seen: dict[str, list[str]] = {}
    for line in (line for figures in read for line in figures["lines"]):
        seen.setdefault(line["name"], [line["name"], line["kind"], line["version"], line["note"]])
    return _markdown(["contestant", "is a", "version", "note"], seen.values())


def cold_table(cold: Sequence[Figures]) -> str:
    """Give rows a second of opening and the first epoch, from a cold start."""
    names = list(dict.fromkeys(line["name"] for figures in cold for line in figures["lines"]))
    rows = []
    for figures in cold:
        found = {line["name"]: line for line in figures["lines"]}
        rows.append([_SET_TITLES[figures["name"]], *(_cold_cell(found.get(name)) for name in names)])
    return _markdown(["rows/s, opening included", *names], rows)


def step_table(lines: Sequence[Figures]) -> str:
    """Give the table of steps, and their ratio to the control, group by group."""
    rows = [
        [
            line["student"], line["soft_targets"], f"{line['step_ms']:.2f}", f"{line['ratio']:.3f}",
            " to ".join(f"{one:.3f}" for one in line["of_groups"]),
        ]
        for line in lines
    ]  # fmt: skip
    return _markdown(["student", "soft targets", "step, ms", "ratio", "of groups"], rows)


def shuffle_table(orders: Sequence[Figures]) -> str:
    """Give the table of orders."""
    header = [
        "blocks of a window", "neighbours in one batch", "variance of class counts", "classes in a batch",
        "displacement: 10 %", "50 %", "90 %",
    ]  # fmt: skip
    rows = [
        [
            line["window"], f"{line['neighbours']:.2f}", f"{line['class_variance']:.2f}",
            f"{line['classes_in_batch']:.1f}", *(f"{line[f'displacement_{at}']:.3f}" for at in (10, 50, 90)),
        ]
        for line in orders
    ]  # fmt: skip
    return _markdown(header, rows)


def students_table(students: Sequence[Figures]) -> str:
    """Give the table of students."""
    rows = [
        [
            line["window"], f"{100 * statistics.mean(line['accuracies']):.2f} %",
            ", ".join(f"{100 * one:.1f}" for one in line["accuracies"]),
        ]
        for line in students
    ]  # fmt: skip
    return _markdown(["blocks of a window", "test accuracy, mean", "of single seeds"], rows)


def draw(document: Figures, folder: Path) -> list[Path]:
    """Draw what there are figures for: rows per CPU-second, and the orders."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "kdcache"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if document.get("read"):
        drawn += _save(_reading_picture(document["read"]), folder / "streaming")
    if document.get("shuffle"):
        drawn += _save(_shuffle_picture(document["shuffle"]["orders"]), folder / "shuffle")
    return drawn


def _reading_picture(read: Sequence[Figures]) -> Any:
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(line["name"] for figures in read for line in figures["lines"]))
    figure, grid = plt.subplots(
        1, len(read), figsize=(4 + 2.8 * len(read), 1.2 + 0.27 * len(names)), sharey=True, squeeze=False
    )
    for axes, figures in zip(grid[0], read, strict=True):
        for line in figures["lines"]:
            if line["error"] is None:
                rate = statistics.median(line["rows_per_cpu_second"])
                axes.barh(names.index(line["name"]), rate, color=_COLOURS[line["kind"]], height=0.7)
        axes.set(xscale="log", title=_SET_TITLES[figures["name"]], xlabel="rows per CPU-second")
        axes.grid(visible=True, axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].invert_yaxis()
    figure.tight_layout()
    return figure


def _shuffle_picture(orders: Sequence[Figures]) -> Any:
    from matplotlib import pyplot as plt

    windowed = [line for line in orders if line["window"].isdigit()]
    (true,) = (line for line in orders if line["window"] == "true permutation")
    shown = {
        "neighbours": "neighbours in storage\nin one batch, over a permutation",
        "class_variance": "variance of class counts,\nover a permutation",
        "classes_in_batch": "classes in a batch",
    }
    figure, row = plt.subplots(1, len(shown), figsize=(11, 3.2))
    for axes, (name, title) in zip(row, shown.items(), strict=True):
        axes.plot([int(line["window"]) for line in windowed], [line[name] for line in windowed], "o-", color="#0072B2")
        axes.axhline(true[name], color="#999999", linestyle="--")
        axes.set(xscale="log", yscale="log", title=title, xlabel="blocks of a window")
        axes.set_xticks([int(line["window"]) for line in windowed], [line["window"] for line in windowed])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(written[0], dpi=110, metadata={"Software": None})
    figure.savefig(written[1], metadata={"Date": None})
    plt.close(figure)
    return written


def _names(read: Sequence[Figures], kind: str) -> list[str]:
    return list(dict.fromkeys(line["name"] for figures in read for line in figures["lines"] if line["kind"] == kind))


def _cold_cell(line: Figures | None) -> str:
    if line is None:
        return ""
    if line["error"] is not None:
        return f"did not run: {line['error']}"
    rates = line["rows_per_second"]
    return f"{_rate(statistics.median(rates))} ({_rate(min(rates))} to {_rate(max(rates))})"


def _rate(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if not place else "---:" for place in range(len(header))]
    cells_of = (header, rule, *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in cells_of)
