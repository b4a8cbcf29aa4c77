"""The figures as tables in Markdown, and as a picture: bytes a row against KL."""

from __future__ import annotations

__all__ = ["all_tables", "draw", "ensemble_table", "fidelity_table", "filled", "l1_table", "rates_table"]

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

_TITLES: Final = {
    "smollm2": "SmolLM2-135M, 49,152 classes",
    "efficientnet-lite0": "EfficientNet-Lite0, 1,000 classes",
    "ppocr": "PP-OCRv6, 18,710 classes",
}
_STYLES: Final = {  # colours that the colour-blind can tell apart (Okabe and Ito 2008), and markers
    "kdcache spectral": ("#0072B2", "o"),
    "kdcache topk, class means": ("#56B4E9", "s"),
    "kdcache topk, samples": ("#56B4E9", "d"),
    "kdcache codes": ("#009E73", "^"),
    "DistillKit, leftover^(1/T)": ("#D55E00", "v"),
    "DistillKit, renormalised": ("#E69F00", "v"),
    "TinyViT": ("#CC79A7", "X"),
    "ml-dr": ("#333333", "D"),
    "random sampling at T=1": ("#999999", "<"),
    "random sampling at T=2": ("#999999", ">"),
}
_MOSTLY: Final = 0.5  # of the rows infinite: marked
_TICKS: Final = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_SHOWN: Final = ("1", "1.5", "2", "4", "10", "20")
_BIAS_SHOWN: Final = ("1", "2", "4", "20")

Line = Mapping[str, Any]


def all_tables(document: Mapping[str, Any]) -> dict[str, str]:
    """Give every table of a results file, in Markdown, by name."""
    lines = document["lines"]
    tables = {}
    for teacher in dict.fromkeys(line["teacher"] for line in lines):
        tables[f"{teacher} KL"] = fidelity_table(lines, teacher)
        tables[f"{teacher} L1"] = l1_table(lines, teacher)
    tables["costs"] = rates_table(lines, document["forward_seconds"])
    if document["ensemble"]:
        tables["ensemble"] = ensemble_table(document["ensemble"])
    return tables


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Put tables into a page, each between ``<!-- table NAME -->`` and ``<!-- end -->``.

    Examples
    --------
    >>> filled("<!-- table a --> old <!-- end -->", {"a": "new"}).split()
    ['<!--', 'table', 'a', '-->', 'new', '<!--', 'end', '-->']
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table {name} -->\n{tables[name]}\n<!-- end -->" if name in tables else match[0]

    return re.sub(r"<!-- table (?P<name>[^>]*?) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def fidelity_table(lines: Sequence[Line], teacher: str) -> str:
    """Give the table of one teacher: bytes, and KL at every temperature as mean and maximum."""
    header = ["kept by", "set to", "bytes a row", *(f"T={at}" for at in _SHOWN), "worst row"]
    rows = []
    for line in _of(lines, teacher):
        infinite = max(one["infinite_rows"] for one in line["fidelity"].values()) >= _MOSTLY
        mark = " *" if infinite else ""
        figures = [f"{_short(line['fidelity'][at]['kl_mean'])}{mark}" for at in _SHOWN]
        worst = max(line["fidelity"][at]["kl_max"] for at in _SHOWN)
        name = f"**{line['family']}**" if line["is_ours"] else line["family"]
        rows.append([name, line["setting"], f"{line['row_bytes']:.0f}", *figures, _short(worst)])
    return _markdown(header, rows)


def l1_table(lines: Sequence[Line], teacher: str) -> str:
    """Give the table of L1 as the mean over rows, and the bias."""
    header = [
        "kept by",
        "set to",
        "bytes a row",
        *(f"T={at}" for at in _SHOWN),
        *(f"bias T={at}" for at in _BIAS_SHOWN),
    ]
    rows = [
        [
            f"**{line['family']}**" if line["is_ours"] else line["family"],
            line["setting"],
            f"{line['row_bytes']:.0f}",
            *(_short(line["fidelity"][at]["l1_mean"]) for at in _SHOWN),
            *(_short(line["fidelity"][at]["bias_l1"]) for at in _BIAS_SHOWN),
        ]
        for line in _of(lines, teacher)
        if line["is_default"]
    ]
    return _markdown(header, rows)


def rates_table(lines: Sequence[Line], forward_seconds: Mapping[str, float]) -> str:
    """Give the table of costs: bytes apart from the rows, rates, and encoding as a share of the forward pass."""
    header = ["teacher", "kept by", "set to", "encode rows/s", "decode rows/s", "encode / forward", "fixed bytes",
              "other bytes a row", "rows to break even with DistillKit k=128 / TinyViT k=100"]  # fmt: skip
    rows = []
    for line in lines:
        if not line["is_default"]:
            continue
        seconds = forward_seconds.get(line["teacher"])
        share = f"{1 / line['encode_rows_per_second'] / seconds:.2%}" if seconds else ""
        rows.append(
            [
                line["teacher"], line["family"], line["setting"], f"{line['encode_rows_per_second']:,.0f}",
                f"{line['decode_rows_per_second']:,.0f}", share, f"{line['parameter_bytes']:,}",
                f"{line['metadata_row_bytes']:.0f}", " / ".join(_break_even(line, lines)),
            ]
        )  # fmt: skip
    return _markdown(header, rows)


def ensemble_table(lines: Sequence[Line]) -> str:
    """Give the table of the ensemble."""
    header = ["kept", "mean", "bytes a view", *(f"T={at}" for at in _SHOWN), "worst row"]
    rows = [
        [
            line["what"], line["mean"], f"{line['row_bytes']:.0f}", *(_short(line["kl_mean"][at]) for at in _SHOWN),
            _short(max(line["kl_max"].values())),
        ]
        for line in lines
    ]  # fmt: skip
    return _markdown(header, rows)


def draw(lines: Sequence[Line], path: Path) -> tuple[Path, ...]:
    """Draw bytes a row against mean KL, a panel for each teacher and temperature; PATH.png and PATH.svg.

    Hollow markers are formats that leave classes at 0: their KL is infinite, and shown after the floor.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "kdcache"
    teachers = [name for name in _TITLES if any(line["teacher"] == name for line in lines)]
    families = [name for name in _STYLES if any(line["family"] == name for line in lines)]
    figure, grid = plt.subplots(
        len(teachers), len(_SHOWN), figsize=(15, 3.3 * len(teachers) + 0.8), sharey="row", sharex="row", squeeze=False
    )
    for row, teacher in zip(grid, teachers, strict=True):
        for axes, at in zip(row, _SHOWN, strict=True):
            for family in families:
                _draw_family(axes, [one for one in _of(lines, teacher) if one["family"] == family], at)
            axes.set(xscale="log", yscale="log", title=f"T = {at}")
            axes.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            left, right = axes.get_xlim()
            axes.set_xticks([tick for tick in _TICKS if left <= tick <= right], minor=False)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.minorticks_off()
        row[0].set_ylabel(f"{_TITLES[teacher]}\nmean KL, nats", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("bytes a row")
    drawn: dict[str, Any] = {}
    for axes in grid.flat:
        drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | drawn
    figure.legend(
        [drawn[name] for name in families if name in drawn], [name for name in families if name in drawn],
        loc="upper center", ncols=5, frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.7 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = (path.with_suffix(".png"), path.with_suffix(".svg"))
    figure.savefig(written[0], dpi=110, metadata={"Software": None})
    figure.savefig(written[1], metadata={"Date": None})
    plt.close(figure)
    return written


def _draw_family(axes: Any, lines: Sequence[Line], at: str) -> None:
    points = [(line["row_bytes"], line["fidelity"][at]) for line in sorted(lines, key=itemgetter("row_bytes"))]
    if not points:
        return
    colour, marker = _STYLES[lines[0]["family"]]
    ours = lines[0]["is_ours"]
    is_hollow = any(figures["infinite_rows"] >= _MOSTLY for _, figures in points)
    axes.plot(
        [row_bytes for row_bytes, _ in points], [figures["kl_mean"] for _, figures in points], color=colour,
        marker=marker, markersize=6, linewidth=1.8 if ours else 0.9, linestyle="-" if ours else "--",
        markerfacecolor="white" if is_hollow else colour, label=lines[0]["family"], zorder=3 if ours else 2,
    )  # fmt: skip


def _break_even(line: Line, lines: Sequence[Line]) -> Iterable[str]:
    if not line["is_ours"]:
        return
    for family, setting in (("DistillKit, leftover^(1/T)", "k=128"), ("TinyViT", "k=100")):
        (other,) = (one for one in _of(lines, line["teacher"]) if one["family"] == family and one["setting"] == setting)
        saved = other["row_bytes"] - line["row_bytes"]
        yield f"{line['parameter_bytes'] / saved:,.0f}" if saved > 0 else "never"


def _of(lines: Sequence[Line], teacher: str) -> list[Line]:
    return [line for line in lines if line["teacher"] == teacher]


def _short(value: float) -> str:
    if value < 1e-12:  # rounding, of either sign
        return "0"
    return f"{value:.2g}" if value >= 0.0001 else f"{value:.0e}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if place < 2 else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
