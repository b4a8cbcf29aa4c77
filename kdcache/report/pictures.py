"""Pictures, drawn with matplotlib (the extra `plot`), each written as PNG and SVG.

Every picture says its units, labels its lines where they end, and is drawn in colours that the colour-blind can tell
apart (Okabe and Ito 2008). Equal figures give equal files.
"""

from __future__ import annotations

__all__ = ["COLOURS", "GREY", "INK", "Bar", "bars", "draw_figure", "require_matplotlib", "student_curves"]

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import MissingExtraError
from kdcache.report.curves import Curve, gather_curves
from kdcache.report.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, _FAINT = "#333333", "#777777", "#BBBBBB"
_MARKERS = ("o", "s", "^", "D")
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "kdcache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a picture.

    Parameters
    ----------
    label : str
    value : float
        Its length.
    low, high : float, optional
        Ends of a thin line over the bar: the spread.
    emphasis : bool
        Drawn in colour; the others are grey.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    emphasis: bool = False


def student_curves(
    metrics: Sequence[str | Path | Mapping[str, Any]], path: str | Path, *, title: str = "Test error of students"
) -> tuple[Path, ...]:
    """Draw the students' test error over the temperature of their soft targets.

    A line for each sweep and soft weight: the mean over seeds, in a band from the best seed to the worst. Baselines on
    hard labels alone, and logit matching, know no temperature and are level lines.

    Parameters
    ----------
    metrics : sequence of paths or of mappings
        Files metrics.jsonl (or folders with some), or their lines.
    path : str or Path
        Where the pictures go, without a suffix: PATH.png and PATH.svg.
    title : str
        Stands above the picture.

    Returns
    -------
    tuple of Path
        The files written; none where no student was tested.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    JobError
        There is no such metrics file.
    """
    require_matplotlib()
    lines: list[Mapping[str, Any]] = []
    for item in metrics:
        lines += [item] if isinstance(item, Mapping) else read_metrics(item)
    curves = gather_curves(lines)
    if not curves:
        return ()
    return _draw(Path(path), (7.0, 4.2), lambda axes: _draw_curves(axes, curves, title))


def bars(
    rows: Sequence[Bar], path: str | Path, *, title: str, unit: str, number_format: str = ".3g"
) -> tuple[Path, ...]:
    """Draw a table of figures as horizontal bars, the first on top, each with its figure written at its end.

    Parameters
    ----------
    rows : sequence of Bar
    path : str or Path
        Where the pictures go, without a suffix: PATH.png and PATH.svg.
    title : str
        Stands above the picture.
    unit : str
        What the bars measure, under the axis, such as ``test error (%)``.
    number_format : str
        How figures are written, as for `format`.

    Returns
    -------
    tuple of Path
        The files written; none where there are no rows.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    require_matplotlib()
    if not rows:
        return ()
    size = (7.0, 1.2 + 0.34 * len(rows))
    return _draw(Path(path), size, lambda axes: _draw_bars(axes, rows, title, unit, number_format))


def require_matplotlib() -> None:
    """Refuse to draw where matplotlib is not installed.

    Raises
    ------
    MissingExtraError
        The message says what to install.
    """
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise MissingExtraError(
            "pictures need matplotlib, which is not installed; install it with: pip install 'kdcache[plot]'"
        ) from error


def _draw(path: Path, size: tuple[float, float], draw: Callable[[Axes], None]) -> tuple[Path, ...]:
    return draw_figure(path, size, lambda figure: draw(figure.add_subplot()))


def draw_figure(
    path: Path, size: tuple[float, float], draw: Callable[[Figure], None], *, kinds: Sequence[str] = ("png", "svg")
) -> tuple[Path, ...]:
    """Draw a figure in the style of all pictures, and write it as PATH.png and PATH.svg.

    Parameters
    ----------
    path : Path
        Without a suffix.
    size : tuple of float
        Width and height in inches.
    draw : callable (Figure) -> None
    kinds : sequence of str
        The suffixes.
    """
    import matplotlib as mpl  # noqa: PLC0415 - as above
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        return tuple(_write(figure, path.with_name(f"{path.name}.{kind}")) for kind in kinds)


def _write(figure: Figure, path: Path) -> Path:
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=metadata)
    path.write_bytes(buffer.getvalue())
    return path


def _draw_curves(axes: Axes, curves: Sequence[Curve], title: str) -> None:
    many_sweeps = len({curve.sweep for curve in curves}) > 1
    labels = []
    for index, curve in enumerate(curves):
        plain = curve.soft_weight == 0 and not many_sweeps
        colour = INK if plain else COLOURS[index % len(COLOURS)]
        _draw_curve(axes, curve, colour, _MARKERS[index // len(COLOURS) % len(_MARKERS)])
        labels.append((100 * curve.points[-1].mean, _label(curve, many_sweeps=many_sweeps), colour))
    axes.set_title(title, pad=22)
    axes.set_xlabel("temperature of the soft targets")
    axes.set_ylabel("test error (%)")
    _scale_temperatures(axes, sorted({value for curve in curves for value in curve.temperatures}))
    _explain_seeds(axes, max(len(point.errors) for curve in curves for point in curve.points))
    _label_ends(axes, labels)


def _draw_curve(axes: Axes, curve: Curve, colour: str, marker: str) -> None:
    means = [100 * point.mean for point in curve.points]
    lows = [100 * point.low for point in curve.points]
    highs = [100 * point.high for point in curve.points]
    if curve.is_level:
        axes.axhspan(lows[0], highs[0], color=colour, alpha=0.12, linewidth=0)
        axes.axhline(means[0], color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
        return
    axes.fill_between(curve.temperatures, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve.temperatures, means, color=colour, linewidth=1.8, marker=marker, markersize=4.5)


def _explain_seeds(axes: Axes, num_seeds: int) -> None:
    text = "one seed each" if num_seeds == 1 else f"mean over {num_seeds} seeds, in a band from the best to the worst"
    axes.annotate(
        text, xy=(0, 1), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", color=GREY, fontsize=9
    )


def _label(curve: Curve, *, many_sweeps: bool) -> str:
    kind = f"soft weight {curve.soft_weight:g}"
    if curve.soft_weight == 0:
        kind = "hard labels"
    elif curve.is_level:
        kind = f"logit matching, {kind}"
    return f"{curve.sweep}, {kind}" if many_sweeps else kind


def _scale_temperatures(axes: Axes, temperatures: Sequence[float]) -> None:
    if not temperatures:
        axes.set_xticks([])
        axes.set_xlabel("")
        return
    axes.set_xscale("log")
    axes.set_xticks(list(temperatures), [f"{temperature:g}" for temperature in temperatures])
    axes.set_xticks([], minor=True)
    if len(temperatures) == 1:
        axes.set_xlim(temperatures[0] / 2, temperatures[0] * 2)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's label right of its end, moved up where labels would lie on each other."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    height = -float("inf")
    for value, text, colour in sorted(labels):
        height = max(value, height + gap)
        axes.annotate(
            text,
            xy=(1.0, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
            annotation_clip=False,
        )


def _draw_bars(axes: Axes, rows: Sequence[Bar], title: str, unit: str, number_format: str) -> None:
    positions = range(len(rows))
    colours = [COLOURS[0] if row.emphasis else _FAINT for row in rows]
    axes.barh(positions, [row.value for row in rows], height=0.62, color=colours)
    for position, row in zip(positions, rows, strict=True):
        end = row.value
        if row.low is not None and row.high is not None:
            axes.hlines(position, row.low, row.high, color=INK, linewidth=1.2)
            end = max(end, row.high)
        axes.annotate(
            format(row.value, number_format),
            xy=(max(end, 0), position),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
        )
    axes.set_yticks(list(positions), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_title(title, pad=12)
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
