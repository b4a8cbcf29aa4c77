"""The picture of a plan: what a row costs against what it keeps."""

from __future__ import annotations

__all__ = ["RatePoints", "check_picture", "rate_curves"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import OptionError
from kdcache.report.pictures import COLOURS, GREY, INK, draw_figure, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")
_MAX_COLUMNS = 3
_SOLID: Any = {"marker": "o", "markersize": 4.5}
_DASHED: Any = {"marker": "s", "markersize": 4, "linestyle": (0, (4, 2))}
_SMALLEST_KL = 1e-12
"""Drawn at the foot of the picture: exact to rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoints:
    """One measured codec in the picture: a point at each temperature.

    Parameters
    ----------
    series : str
        What it is. Points of one series are joined by lines; a series of one point has its name beside it.
    bytes_per_row : float
    kl : mapping of temperature to float
        Mean KL, in nats.
    is_choice : bool
        Drawn with a ring.
    """

    series: str
    bytes_per_row: float
    kl: Mapping[float, float]
    is_choice: bool = False


def check_picture(path: Path) -> None:
    """Refuse, before anything is measured, a picture that could not be drawn.

    Raises
    ------
    OptionError
        The path ends in neither .png nor .svg.
    MissingExtraError
        matplotlib is not installed.
    """
    if path.suffix not in _SUFFIXES:
        raise OptionError(f"the picture {path} ends in neither .png nor .svg; name it so. Nothing was written")
    require_matplotlib()


def rate_curves(teachers: Mapping[str, Sequence[RatePoints]], path: Path, *, title: str) -> Path:
    """Draw bytes a row against mean KL, both on logarithmic axes: a panel a teacher, a line a temperature.

    Exact codecs, whose KL is 0, are dashed lines at their bytes.

    Parameters
    ----------
    teachers : mapping of name to sequence of RatePoints
    path : Path
        Ends in .png or .svg.
    title : str
        Stands above the picture.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    OptionError, MissingExtraError
        As `check_picture`.
    """
    check_picture(path)
    num_columns = max(1, min(_MAX_COLUMNS, len(teachers)))
    num_lines = max(1, math.ceil(len(teachers) / num_columns))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(num_lines, num_columns, squeeze=False).flatten()
        for panel in panels[len(teachers) :]:
            panel.remove()
        for panel, (name, points) in zip(panels, teachers.items(), strict=False):
            _draw_panel(panel, name, points)
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=12)

    size = (1.6 + 5.2 * num_columns, 0.5 + 3.7 * num_lines)
    (written,) = draw_figure(path.with_suffix(""), size, draw, kinds=(path.suffix[1:],))
    return written


def _draw_panel(axes: Axes, name: str, points: Sequence[RatePoints]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415 - an extra

    temperatures = sorted({temperature for point in points for temperature in point.kl})
    lossy = [point for point in points if max(point.kl.values()) > _SMALLEST_KL]
    axes.set_xscale("log")
    axes.set_yscale("log")
    series = {item.series: sorted((p for p in lossy if p.series == item.series), key=_bytes) for item in lossy}
    joined = [text for text, members in series.items() if len(members) > 1]
    for colour, temperature in zip(COLOURS, temperatures, strict=False):
        for index, (text, members) in enumerate(series.items()):
            style = _DASHED if text in joined[1:] else _SOLID
            label = f"temperature {temperature:g}" if index == 0 else None
            axes.plot(*_line(members, temperature), color=colour, linewidth=1.5, label=label, **style)
        chosen = [point for point in lossy if point.is_choice]
        axes.plot(*_line(chosen, temperature), linestyle="none", marker="o", markersize=11, mfc="none", mec=colour)
    for text, members in series.items():
        _name(axes, text, members, is_above=text in joined[1:])
    for point in points:
        if point not in lossy:
            axes.axvline(point.bytes_per_row, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            _write(axes, f" {point.series}: exact", point.bytes_per_row, 0.02, is_choice=point.is_choice)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(name)
    axes.set_xlabel("bytes a row, parameters apart")
    axes.set_ylabel("mean KL on held-out rows (nats)")
    if lossy:
        axes.legend(frameon=False, fontsize=9)
    axes.margins(x=0.15, y=0.15)


def _bytes(point: RatePoints) -> float:
    return point.bytes_per_row


def _line(points: Sequence[RatePoints], temperature: float) -> tuple[list[float], list[float]]:
    return [point.bytes_per_row for point in points], [max(point.kl[temperature], _SMALLEST_KL) for point in points]


def _name(axes: Axes, text: str, members: Sequence[RatePoints], *, is_above: bool) -> None:
    """Write a series' name under its last point or above its first, and of the choice that its ring is the choice."""
    point, offset = (members[0], 10) if is_above else (members[-1], -10)
    kl = max(point.kl.values()) if is_above else min(point.kl.values())
    is_choice = any(point.is_choice for point in members)
    axes.annotate(
        f"{text} (ring: chosen)" if is_choice else text,
        xy=(point.bytes_per_row, max(kl, _SMALLEST_KL)),
        xytext=(0, offset),
        textcoords="offset points",
        horizontalalignment="left" if is_above else "center",
        verticalalignment="bottom" if is_above else "top",
        color=INK if is_choice else GREY,
        fontsize=9,
    )


def _write(axes: Axes, text: str, position: float, height: float, *, is_choice: bool) -> None:
    axes.annotate(
        f"{text}, chosen" if is_choice else text,
        xy=(position, height),
        xycoords=axes.get_xaxis_transform(),
        rotation=90,
        horizontalalignment="right",
        verticalalignment="bottom",
        color=INK if is_choice else GREY,
        fontsize=9,
    )
