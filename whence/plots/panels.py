"""The grammars of figures: points with intervals, bars, lines and scatters; each data first, then its drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.plots.style import LOWERS, NEUTRAL, RAISES, SERIES, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float, float] | None
"""Mean, low and high end of its interval (NaN where there is none); None where nothing was measured."""

LOOK = {"base": ("s", NEUTRAL), "tuned": ("o", RAISES)}
"""Markers and colours of models."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COURSE = 3
"""Points from which on a line joins them: between two it would show a course that nobody measured."""
MANY = 400
"""Points above which a scatter is drawn smaller and paler."""


@dataclass(frozen=True)
class Points:
    """Points with intervals, one row per label, and a series of them per model."""

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[Point]]
    chance: list[float] = field(default_factory=list)
    """What guessing gives, per label."""
    around_zero: bool = False
    """The points are differences: zero means none."""


@dataclass(frozen=True)
class Scatter:
    """Pairs of a score and what was measured, with the correlation that belongs to them."""

    title: str
    x: np.ndarray
    y: np.ndarray
    r: float
    """Pearson's, mean over queries."""
    x_label: str = "influence, nats per copy"
    y_label: str = "measured, nats per copy"


@dataclass(frozen=True)
class Bars:
    """One bar per label and series, with half-widths or ends of its interval."""

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[float]]
    ends: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    logarithmic: bool = False
    """For sizes that differ by orders of magnitude: dots instead of bars, which would begin nowhere."""
    base: float = 0.0
    """Where bars begin: what guessing would give."""


@dataclass(frozen=True)
class Lines:
    """Curves over one axis, with bands where they have intervals."""

    title: str
    x_label: str
    y_label: str
    curves: dict[str, list[tuple[float, float]]]
    bands: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    logarithmic: tuple[bool, bool] = (False, False)


def points_figure(panels: Sequence[Points]) -> Figure:
    """Draw panels of points below each other; bars are 95 % intervals."""
    drawing = _stacked(panels, [0.9 + 0.36 * len(panel.labels) for panel in panels], 0.6, _points)
    if panels:
        drawing.supxlabel("bars: 95 % intervals", fontsize=8, color=NEUTRAL)
    else:
        drawing.text(0.5, 0.5, "nothing to compare: no references, and no answers of a base model", ha="center", color=NEUTRAL)
    return drawing


def bars_figure(panels: Sequence[Bars]) -> Figure:
    """Panels of horizontal bars below each other."""
    return _stacked(panels, [0.8 + len(panel.labels) * (0.14 + 0.16 * len(panel.series)) for panel in panels], 0.3, _bars)


def lines_figure(lines: Lines) -> Figure:
    """Curves with their bands."""
    drawing, (axes,) = figure(6.4, 3.8)
    colours = [LOWERS if name == "random" else SERIES[number % len(SERIES)] for number, name in enumerate(lines.curves)]
    for number, (name, points) in enumerate(lines.curves.items()):
        x, y = zip(*points, strict=True)
        style = "--" if name == "random" else "-"
        style = style if len(points) >= COURSE else ""
        axes.plot(x, y, MARKERS[number % len(MARKERS)] + style, color=colours[number], label=name, markersize=5, linewidth=1.6)
        if name in lines.bands and style:
            low, high = zip(*lines.bands[name], strict=True)
            axes.fill_between(x, low, high, color=colours[number], alpha=0.14, linewidth=0)
        elif name in lines.bands:
            axes.vlines(x, *zip(*lines.bands[name], strict=True), color=colours[number], alpha=0.5)
    for axis, wanted in zip("xy", lines.logarithmic, strict=True):
        if wanted:
            getattr(axes, f"set_{axis}scale")("log")
    _named(axes, lines.title, lines.x_label, lines.y_label)
    axes.legend(fontsize=8, frameon=False)
    return drawing


def scatter_figure(panels: Sequence[Scatter]) -> Figure:
    """Panels beside each other; the line is where both are equal."""
    drawing, every = figure(3.6 * len(panels) + 0.4, 3.7, columns=len(panels))
    for axes, panel in zip(every, panels, strict=True):
        crowded = len(panel.x) > MANY
        axes.axline((0, 0), slope=1, color=NEUTRAL, linewidth=0.9, linestyle="--")
        axes.scatter(panel.x, panel.y, s=7 if crowded else 14, color=RAISES, alpha=0.45 if crowded else 0.7, linewidths=0)
        _named(axes, f"{panel.title}\nr = {panel.r:.3f}", panel.x_label, panel.y_label)
        axes.ticklabel_format(style="sci", scilimits=(-2, 3), axis="both")
        for text in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
            text.set_fontsize(8)
    return drawing


def _stacked(panels: Sequence[Any], heights: Sequence[float], more: float, draw: Callable[[Axes, Any], None]) -> Figure:
    """Panels of named rows below each other, the first row at the top."""
    drawing, every = figure(7.2, more + (sum(heights) or 1.5), rows=len(panels), height_ratios=heights)
    for axis, panel in zip(every, panels, strict=True):
        draw(axis, panel)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(len(panel.labels) - 0.4, -0.6)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.set_xlabel(panel.unit, fontsize=9)
        if len(panel.series) > 1 or getattr(panel, "chance", ()):
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return drawing


def _named(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def _points(axes: Axes, panel: Points) -> None:
    for number, (name, points) in enumerate(panel.series.items()):
        offset = 0.16 * (2 * number - (len(panel.series) - 1))
        (marker, colour), label = LOOK.get(name, ("D", SERIES[2 + number % 4])), name
        for row, point in enumerate(points):
            if point is not None:
                mean, low, high = point
                axes.plot([low, high], [row + offset] * 2, color=colour, linewidth=2, solid_capstyle="butt")
                axes.plot([mean], [row + offset], marker, color=colour, markersize=6, label=label, clip_on=False)
                label = None
    for row, chance in enumerate(panel.chance):
        label = "guessing" if row == 0 else None
        look = {"color": SERIES[1], "linestyle": ":", "linewidth": 1.8, "zorder": 1.5}
        axes.plot([chance] * 2, [row - 0.42, row + 0.42], label=label, **look)
    if panel.around_zero:
        axes.axvline(0, color="black", linewidth=1, zorder=1.5)
    else:
        axes.set_xlim(left=0)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=9)


def _bars(axes: Axes, panel: Bars) -> None:
    thick = 0.8 / len(panel.series)
    for number, (name, values) in enumerate(panel.series.items()):
        at = [row + thick * (number - (len(panel.series) - 1) / 2) for row in range(len(values))]
        if panel.logarithmic:
            axes.plot(values, at, MARKERS[number], color=SERIES[number], label=name, markersize=7)
        else:
            drawn = [0.0 if math.isnan(value) else value - panel.base for value in values]
            axes.barh(at, drawn, 0.88 * thick, left=panel.base, color=SERIES[number], label=name)
        for place, (low, high) in zip(at, panel.ends.get(name, []), strict=False):
            axes.plot([low, high], [place, place], color="black", linewidth=1.3, solid_capstyle="butt")
        for place, value, (_, high) in zip(at, values, panel.ends.get(name, [(0.0, v) for v in values]), strict=True):
            if not math.isnan(value):
                end = max(panel.base, value, high if math.isfinite(high) else value)
                shift = (6 if panel.logarithmic else 3, 0)
                axes.annotate(f"{value:.3g}", (end, place), shift, textcoords="offset points", va="center", fontsize=7)
    if panel.logarithmic:
        axes.set_xscale("log")
    else:
        axes.axvline(panel.base, color="black", linewidth=0.9)
    axes.margins(x=0.09)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=8)
