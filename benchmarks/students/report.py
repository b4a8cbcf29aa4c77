"""The figures as tables in Markdown, and as a picture: bytes a row against what a student loses."""

from __future__ import annotations

__all__ = ["all_tables", "draw", "overview", "speeds", "summary", "table"]

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.students.pairs import paired, scores_of

_COLUMNS: Final = {
    "kl": "KL at T=1",
    "kl_at_temperature": "KL at its own T",
    "cross_entropy": "cross-entropy with the next token",
    "agreement": "agreement",
    "calibration_error": "calibration error",
    "kl_main": "KL at T=1, Moby Dick",
    "kl_other": "KL at T=1, State of the Union",
}
_STYLES: Final = {  # the start of an arm's name -> colour that the colour-blind can tell apart, marker
    "kdcache codes": ("#009E73", "^"),
    "full logits, bfloat16": ("#009E73", "^"),
    "kdcache spectral": ("#0072B2", "o"),
    "kdcache topk, class means": ("#56B4E9", "s"),
    "kdcache topk, samples": ("#56B4E9", "d"),
    "DistillKit, renormalised": ("#E69F00", "v"),
    "random sampling at T=1": ("#999999", "<"),
    "random sampling at T=": ("#333333", ">"),
}
_LINEAR_UP_TO: Final = 0.01  # nats
_DIFFERENCE_TICKS: Final = (-0.1, -0.01, 0, 0.01, 0.1, 1)
_BYTES_TICKS: Final = (30, 100, 300, 1000, 10_000)

Found = Mapping[str, Any]


def all_tables(subjects: Mapping[str, Found]) -> dict[str, str]:
    """Give every table of a results file, in Markdown, by name."""
    tables = {name: summary(found) for name, found in subjects.items()}
    for name, found in subjects.items():
        tables |= {f"{name} T={at:g}": table(found, at) for at in found["plan"]["temperatures"]}
        if "speeds" in found:
            tables[f"{name} speeds"] = speeds(found)
    return tables


def speeds(found: Found) -> str:
    """Give the table of how many rows a second a device went through, to two figures."""
    rows = [["what", "rows a second"], ["---", "---:"]]
    rows += [[one["what"], f"{float(format(one['rows_per_second'], '.2g')):,.0f}"] for one in found["speeds"]]
    return _markdown(rows)


def summary(found: Found) -> str:
    """Give the table of one subject: how many percent an arm's KL at temperature 1 is over the full logits'.

    A star as in `table`; the full logits have their KL, in nats.
    """
    temperatures = found["plan"]["temperatures"]
    rows = [
        ["kept", "bytes a row", *(f"learnt at T={at:g}" for at in temperatures)],
        ["---", *["---:"] * (1 + len(temperatures))],
    ]
    arms = found["arms"]
    full = {at: statistics.fmean(scores_of(arms[0], "kl", at).values()) for at in temperatures}
    rows.append([arms[0]["name"], f"{arms[0]['row_bytes']:,.0f}", *(f"{full[at]:.2f} nats" for at in temperatures)])
    for arm in arms[1:]:
        cells = [_percent(arm, arms, at, full[at]) for at in temperatures]
        rows.append([_name(arm), f"{arm['row_bytes']:,.0f}", *cells])
    return _markdown(rows)


def table(found: Found, temperature: float) -> str:
    """Give the table of one subject and temperature.

    The full logits have the mean over seeds and the standard deviation; every other arm its mean difference from them
    in pairs of one seed, the half width of its 95 % confidence interval, and a star where that leaves out 0.
    """
    arms = found["arms"]
    shown = [score for score in _COLUMNS if arms[0]["students"][0].get(score) is not None]
    if temperature == 1:
        shown.remove("kl_at_temperature")
    rows = [["kept", "bytes a row", *(_COLUMNS[score] for score in shown)], ["---", *["---:"] * (len(shown) + 1)]]
    for arm in arms:
        if not scores_of(arm, "kl", temperature):
            continue
        cells = _full(arm, shown, temperature) if arm is arms[0] else _against_full(arm, found, shown, temperature)
        rows.append([_name(arm), f"{arm['row_bytes']:,.0f}", *cells])
    return _markdown(rows)


def overview(subjects: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Give one row a subject and arm: bytes, and the difference in KL at temperature 1 for each temperature."""
    rows = []
    for name, found in subjects.items():
        for arm in found["arms"][1:]:
            differences = {
                f"KL_over_full_at_T={at:g}": (
                    paired(arm, found["arms"], "kl", at).mean if scores_of(arm, "kl", at) else ""
                )
                for at in found["plan"]["temperatures"]
            }
            rows.append({"subject": name, "kept": arm["name"], "bytes_a_row": arm["row_bytes"], **differences})
    return rows


def draw(subjects: Mapping[str, Found], path: Path) -> Path:
    """Draw bytes a row against the difference in KL at temperature 1, a panel for each subject and temperature.

    Small points are seeds, large ones their mean. The grey band is the standard deviation of full-logit students over
    seeds, about 0; the axis is linear up to 0.01 nats and logarithmic from there.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    num_columns = max(len(found["plan"]["temperatures"]) for found in subjects.values())
    figure, grid = plt.subplots(
        len(subjects), num_columns, figsize=(3.4 * num_columns, 3.1 * len(subjects) + 0.9), sharey="row", squeeze=False
    )
    for row, found in zip(grid, subjects.values(), strict=True):
        for axes, temperature in zip(row, found["plan"]["temperatures"], strict=False):
            _draw_panel(axes, found, temperature)
        row[0].set_ylabel(f"{found['title'].partition(',')[0]}\nKL over the full-logit student's, nats", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("bytes a row")
    drawn: dict[str, Any] = {}
    for axes in grid.flat:
        handles, names = axes.get_legend_handles_labels()
        drawn |= dict(zip(names, handles, strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="upper center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.7 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path


def _draw_panel(axes: Any, found: Found, temperature: float) -> None:
    arms = found["arms"]
    spread = statistics.stdev(scores_of(arms[0], "kl", temperature).values())
    axes.axhspan(-spread, spread, color="#EEEEEE", zorder=0)
    axes.axhline(0, color="#AAAAAA", linewidth=0.8, zorder=1)
    for arm in arms[1:]:
        if not scores_of(arm, "kl", temperature):
            continue
        differences = paired(arm, arms, "kl", temperature)
        label, (colour, marker) = next(
            (start, style) for start, style in _STYLES.items() if arm["name"].startswith(start)
        )
        label = "random sampling at the student's T" if label == "random sampling at T=" else label
        places = [arm["row_bytes"]] * len(differences.differences)
        axes.plot(places, differences.differences, ".", color=colour, markersize=4, alpha=0.6, zorder=2)
        axes.plot(
            places[:1], [differences.mean], marker, color=colour, markersize=7, linestyle="", label=label, zorder=3
        )
    axes.set(xscale="log", title=f"student at T = {temperature:g}")
    axes.set_yscale("symlog", linthresh=_LINEAR_UP_TO)
    axes.yaxis.set_major_locator(_fixed(_DIFFERENCE_TICKS))
    axes.xaxis.set_major_locator(_fixed(_BYTES_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _fixed(ticks: tuple[float, ...]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)


def _full(arm: Found, shown: list[str], temperature: float) -> Iterator[str]:
    for score in shown:
        values = list(scores_of(arm, score, temperature).values())
        yield f"{statistics.fmean(values):.4f} (sd {statistics.stdev(values):.4f})"


def _against_full(arm: Found, found: Found, shown: list[str], temperature: float) -> Iterator[str]:
    for score in shown:
        one = paired(arm, found["arms"], score, temperature)
        yield f"{one.mean:+.4f} ± {one.half_width:.4f}{' *' if one.is_seen else ''}"


def _percent(arm: Found, arms: Sequence[Found], temperature: float, full: float) -> str:
    if not scores_of(arm, "kl", temperature):
        return ""
    one = paired(arm, arms, "kl", temperature)
    return f"{100 * one.mean / full:+.1f} %{' *' if one.is_seen else ''}"


def _name(arm: Found) -> str:
    return f"**{arm['name']}**" if arm["is_ours"] else str(arm["name"])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
