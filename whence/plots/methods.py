"""Methods beside each other: how well each does against what it costs, once and for each pair of a query and a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from whence.plots.style import NEUTRAL, SERIES, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Dot(NamedTuple):
    """A method: its name, quality with 95 % ends (None where there are none), seconds once, and seconds per pair."""

    name: str
    quality: float
    ends: tuple[float, float] | None
    one_off: float
    per_pair: float


def quality_against_cost(dots: Sequence[Dot], quality: str) -> Figure:
    """Two panels of the same quality: against the seconds of one-off work, and against those per query and row.

    Methods without one-off work stand at the left edge of their panel.
    """
    drawing, (once, each) = figure(11.0, 5.0, 1, 2, sharey=True)
    least = min((dot.one_off for dot in dots if dot.one_off > 0), default=1.0)
    best = sorted(dots, key=lambda dot: -dot.quality)
    for number, dot in enumerate(best):
        colour = SERIES[number % len(SERIES)]
        for axes, x in ((once, dot.one_off or least / 10), (each, dot.per_pair)):
            if dot.ends is not None:
                axes.plot([x, x], dot.ends, color=colour, linewidth=1, alpha=0.6)
            axes.plot([x], [dot.quality], "o", color=colour)
    for axes, title, what in (
        (once, "One-off work", "seconds before any question (left edge: none)"),
        (each, "Work per pair", "seconds per question and row"),
    ):
        axes.set_xscale("log")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(what)
        axes.axhline(0, color=NEUTRAL, linewidth=0.8)
        axes.margins(x=0.18)
    once.set_ylabel(quality)
    drawing.draw_without_rendering()  # so that places on the page are known
    _label(once, [(dot.name, dot.one_off or least / 10, dot.quality) for dot in best])
    _label(each, [(dot.name, dot.per_pair, dot.quality) for dot in best])
    return drawing


def _label(axes: Axes, named: Sequence[tuple[str, float, float]]) -> None:
    """Names beside their dots, from above; one that would lie on another moves down, with a line to its dot."""
    point = axes.figure.dpi / 72
    taken: list[tuple[float, float, float]] = []
    for name, x, y in named:
        at, level = axes.transData.transform((x, y)) / point
        left, right, base = at + 5, at + 5 + 4.5 * len(name), level + 3
        while below := [other for start, end, other in taken if start < right and left < end and abs(other - base) < 8]:
            base = min(below) - 8
        taken.append((left, right, base))
        line = {"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.4} if base < level - 5 else None
        axes.annotate(
            name,
            (x, y),
            xytext=(5, base - level),
            textcoords="offset points",
            fontsize=8,
            arrowprops=line,
            annotation_clip=False,
        )
