"""The scores of one query: sorted from the highest to the lowest, and how many rows have which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from whence.plots.style import LOWERS, NEUTRAL, RAISES, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 241
BINS = 40


@dataclass(frozen=True)
class Curve:
    """Scores in falling order: `values[i]` is that of rank `ranks[i]` among `rows`; of many, most are of the ends."""

    ranks: tuple[int, ...]
    values: tuple[float, ...]
    rows: int


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` scores lie between `edges[i]` and `edges[i + 1]`; 0 is an edge where scores have both signs."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def score_curve(values: np.ndarray, points: int = POINTS) -> Curve:
    """The sorted scores `[N]`, thinned to about `points` ranks: close together at both ends, where the scores change fast."""
    falling, rows = -np.sort(-values), len(values)
    if rows <= points:
        places = np.arange(rows)
    else:
        near = np.unique(np.geomspace(1, rows / 2, points // 2).astype(int) - 1)
        places = np.unique(np.concatenate([near, rows - 1 - near]))
    return Curve(tuple((places + 1).tolist()), tuple(falling[places].tolist()), rows)


def score_histogram(values: np.ndarray, bins: int = BINS) -> Histogram:
    """Count the scores `[N]` in about `bins` intervals of one width."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Histogram((low, high), (len(values),))
    width = (high - low) / bins
    if low < 0 < high:
        edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    else:
        edges = np.linspace(low, high, bins + 1)
    counts, _ = np.histogram(values, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def draw_scores(curve: Curve, histogram: Histogram, unit: str, title: str = "") -> Figure:
    """The sorted scores on the left, their histogram with a logarithmic count on the right."""
    drawing, (left, right) = figure(9.0, 3.6, columns=2)
    ranks, values = np.array(curve.ranks), np.array(curve.values)
    left.axhline(0, color=NEUTRAL, linewidth=0.8)
    left.fill_between(ranks, values, 0, where=values >= 0, color=RAISES, alpha=0.25, linewidth=0, interpolate=True)
    left.fill_between(ranks, values, 0, where=values <= 0, color=LOWERS, alpha=0.25, linewidth=0, interpolate=True)
    left.plot(ranks, values, color=NEUTRAL, linewidth=1.3, marker="." if curve.rows <= 60 else "")
    left.set_xlabel(f"rank among {curve.rows:,} rows")
    left.set_ylabel(f"effect on the answer ({unit})")
    edges, counts = np.array(histogram.edges), np.array(histogram.counts)
    if len(counts) == 1 and edges[0] == edges[1]:
        right.bar(edges[:1], counts, color=NEUTRAL)
    else:
        middles = (edges[1:] + edges[:-1]) / 2
        right.bar(edges[:-1], counts, np.diff(edges), align="edge", color=[RAISES if m > 0 else LOWERS for m in middles])
        right.set_yscale("log")
        right.set_ylim(bottom=0.6)
    right.set_xlabel(f"effect on the answer ({unit})")
    right.set_ylabel("rows (log scale)")
    left.ticklabel_format(axis="y", scilimits=(-3, 4))
    right.ticklabel_format(axis="x", scilimits=(-3, 4))
    if title:
        drawing.suptitle(title, fontsize=10)
    return drawing
