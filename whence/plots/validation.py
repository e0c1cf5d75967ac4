"""Figures of what was checked against retraining: each a function that gives the numbers and one that draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.linalg.stats import agree
from whence.plots.style import LOWERS, NEUTRAL, RAISES, SERIES, figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MANY = 400
"""Points above which a scatter is drawn smaller and paler."""


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


@dataclass(frozen=True)
class Lines:
    """Curves over one axis, with bands where they have intervals."""

    title: str
    x_label: str
    y_label: str
    curves: dict[str, list[tuple[float, float]]]
    bands: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    logarithmic: tuple[bool, bool] = (False, False)


# numbers


def scatter_of(title: str, scores_QR: np.ndarray, truth_QR: np.ndarray, truth: str = "measured") -> Scatter:
    """All queries and rows as points, and the mean over queries of the correlation over rows."""
    r = agree(scores_QR, truth_QR).pearson
    return Scatter(title, scores_QR.ravel(), truth_QR.ravel(), r, y_label=f"{truth}, nats per copy")


def agreement_bars(table: Sequence[Mapping[str, Any]]) -> Bars:
    """Pearson's correlation by method and by damping or retraining, with twice its standard error (about 95 %)."""
    group, name = ("damping", "method") if "method" in table[0] else ("retraining", "compared")
    groups = list(dict.fromkeys(row[group] for row in table))
    labels = list(dict.fromkeys(row[name] for row in table))
    found = {(row[group], row[name]): row for row in table}

    def ends(row: Mapping[str, Any] | None) -> tuple[float, float]:
        if row is None:
            return math.nan, math.nan
        return row["pearson"] - 2 * row["pearson_se"], min(row["pearson"] + 2 * row["pearson_se"], 1.0)

    series = {key: [found[key, label]["pearson"] if (key, label) in found else math.nan for label in labels] for key in groups}
    bars = {key: [ends(found.get((key, label))) for label in labels] for key in groups}
    return Bars("Correlation with the truth", "Pearson, mean over queries; lines: two standard errors", labels, series, bars)


def ladder_bars(table: Sequence[Mapping[str, Any]]) -> list[Bars]:
    """Of the decomposition: the size of each gap, with and without own control, and correlations with influence, by change."""
    panels = []
    for change in dict.fromkeys(row["change"] for row in table):
        rows = [row for row in table if row["change"] == change]
        steps = [f"{one['objective']} to {two['objective']}" for one, two in zip(rows, rows[1:], strict=False)]
        gaps = {
            "against the own control": [row["gap_to_next"] for row in rows[:-1]],
            "against the trained weights": [row["gap_no_control"] for row in rows[:-1]],
        }
        panels.append(
            Bars(f"Gaps between objectives at a change of {change}", "mean |difference|, nats per copy", steps, gaps, {}, True)
        )
        correlations = {"with influence": [row["pearson_influence"] for row in rows]}
        labels = [row["objective"] for row in rows]
        panels.append(
            Bars(f"Correlation with influence at a change of {change}", "Pearson, mean over queries", labels, correlations)
        )
    return panels


def convergence_lines(table: Sequence[Mapping[str, Any]]) -> Lines:
    """Relative difference between exact influence and the PBRF by the size of the change, one curve per damping."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        size = float(row["change"].removesuffix("/N"))
        curves.setdefault(row["damping"], []).append((size, row["relative_error"]))
    return Lines(
        "The smaller the change, the nearer the PBRF", "change, copies of the row", "relative error", curves, {}, (True, True)
    )


def interval_bars(table: Sequence[Mapping[str, Any]], value: str, unit: str, title: str = "") -> Bars:
    """One bar per method of a table with the columns method, `value`, and `value`_low and `value`_high (or low and high)."""
    low, high = (f"{value}_{end}" if f"{value}_{end}" in table[0] else end for end in ("low", "high"))
    labels, values = [row["method"] for row in table], [row[value] for row in table]
    ends = [(row[low], row[high]) for row in table]
    return Bars(title or unit[:1].upper() + unit[1:], f"{unit}; lines: 95 % intervals", labels, {unit: values}, {unit: ends})


def removal_lines(table: Sequence[Mapping[str, Any]]) -> Lines:
    """How much the queries' loss rises after retraining without each method's top rows, by share removed.

    Rows have method, share (of the rows removed), removed (other rows than top and random are left out), mean (rise of the
    loss, nats), low, high.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    bands: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(table, key=lambda row: row["share"]):
        if row["removed"] in ("top", "random"):
            curves.setdefault(row["method"], []).append((100 * row["share"], row["mean"]))
            bands.setdefault(row["method"], []).append((row["low"], row["high"]))
    return Lines(
        "Retrained without each query's top rows", "rows removed, %", "fall of log p, nats (bands: 95 %)", curves, bands
    )


# drawing


def scatter_figure(panels: Sequence[Scatter]) -> Figure:
    """Panels beside each other; the line is where both are equal."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(3.6 * len(panels) + 0.4, 3.7), layout="constrained")
    for axes, panel in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        tidy(axes)
        crowded = len(panel.x) > MANY
        axes.axline((0, 0), slope=1, color=NEUTRAL, linewidth=0.9, linestyle="--")
        axes.scatter(panel.x, panel.y, s=7 if crowded else 14, color=RAISES, alpha=0.45 if crowded else 0.7, linewidths=0)
        axes.set_title(f"{panel.title}\nr = {panel.r:.3f}", loc="left", fontsize=10)
        axes.set_xlabel(panel.x_label, fontsize=9)
        axes.set_ylabel(panel.y_label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(style="sci", scilimits=(-2, 3), axis="both")
        for text in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
            text.set_fontsize(8)
    return drawing


def bars_figure(panels: Sequence[Bars]) -> Figure:
    """Panels of horizontal bars below each other."""
    from matplotlib.figure import Figure

    heights = [0.8 + len(panel.labels) * (0.14 + 0.16 * len(panel.series)) for panel in panels]
    drawing = Figure(figsize=(7.2, sum(heights) + 0.3), layout="constrained")
    for axes, panel in zip(drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True):
        _bars(axes, panel)
    return drawing


def lines_figure(lines: Lines) -> Figure:
    """Curves with their bands."""
    drawing, axes = figure(6.4, 3.8)
    colours = [LOWERS if name == "random" else SERIES[number % len(SERIES)] for number, name in enumerate(lines.curves)]
    for number, (name, points) in enumerate(lines.curves.items()):
        x, y = zip(*points, strict=True)
        style = "--" if name == "random" else "-"
        axes.plot(x, y, MARKERS[number % len(MARKERS)] + style, color=colours[number], label=name, markersize=5, linewidth=1.6)
        if name in lines.bands:
            low, high = zip(*lines.bands[name], strict=True)
            axes.fill_between(x, low, high, color=colours[number], alpha=0.14, linewidth=0)
    for axis, wanted in zip("xy", lines.logarithmic, strict=True):
        if wanted:
            getattr(axes, f"set_{axis}scale")("log")
    axes.set_title(lines.title, loc="left", fontsize=10)
    axes.set_xlabel(lines.x_label, fontsize=9)
    axes.set_ylabel(lines.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    return drawing


def _bars(axes: Axes, panel: Bars) -> None:
    tidy(axes)
    thick, several = 0.8 / len(panel.series), len(panel.series) > 1
    for number, (name, values) in enumerate(panel.series.items()):
        at = [row + thick * (number - (len(panel.series) - 1) / 2) for row in range(len(values))]
        if panel.logarithmic:
            axes.plot(values, at, MARKERS[number], color=SERIES[number], label=name, markersize=7)
        else:
            drawn = [0.0 if math.isnan(value) else value for value in values]
            axes.barh(at, drawn, 0.88 * thick, color=SERIES[number], label=name)
        for place, (low, high) in zip(at, panel.ends.get(name, []), strict=False):
            axes.plot([low, high], [place, place], color="black", linewidth=1.3, solid_capstyle="butt")
        for place, value, (_, high) in zip(at, values, panel.ends.get(name, [(0.0, v) for v in values]), strict=True):
            if not math.isnan(value):
                end = max(0.0, value, high if math.isfinite(high) else value)
                axes.annotate(
                    f"{value:.3g}",
                    (end, place),
                    (6 if panel.logarithmic else 3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
    if panel.logarithmic:
        axes.set_xscale("log")
    else:
        axes.axvline(0, color="black", linewidth=0.9)
    axes.margins(x=0.09)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(panel.labels) - 0.4, -0.6)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(panel.unit, fontsize=9)
    if several:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
