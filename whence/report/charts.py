"""Small charts as SVG, drawn from data; colours are classes of the page, and a table says the same beside each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from whence.plots.scores import Curve, Histogram
from whence.show.numbers import many, power_of_ten, typeset

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
"""Around the plot, for labels; in the same units as WIDTH, which are pixels on a phone."""


FOOT = -0.2
"""Where the bars of a histogram stand, in powers of ten: a bar of one row can be seen."""


class _Plot:
    """Maps numbers to places and collects shapes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], label: str):
        self.x, self.y, self.label = x, y, label
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        (a, b), (c, d) = self.at(x1, y1), self.at(x2, y2)
        self.parts.append(f'<line class="{kind}" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>')

    def path(self, kind: str, points: Sequence[tuple[float, float]], shape: str = "polyline") -> None:
        places = " ".join(f"{a:.1f},{b:.1f}" for a, b in (self.at(x, y) for x, y in points))
        self.parts.append(f'<{shape} class="{kind}" points="{places}"/>')

    def box(self, kind: str, x1: float, x2: float, base: float, top: float, title: str) -> None:
        (a, b), (c, d) = self.at(x1, top), self.at(x2, base)
        size = f'x="{a + 0.4:.1f}" y="{b:.1f}" width="{max(0.8, c - a - 0.8):.1f}" height="{max(0.0, d - b):.1f}"'
        self.parts.append(f'<rect class="{kind}" {size}><title>{escape(title)}</title></rect>')

    def below(self, x: float, text: str, anchor: str = "middle", row: int = 0) -> None:
        place, _ = self.at(x, self.y[0])
        self.parts.append(
            f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 13 + 14 * row}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def beside(self, y: float, text: str) -> None:
        _, place = self.at(self.x[0], y)
        self.parts.append(f'<text x="{LEFT - 5}" y="{place + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')

    def svg(self) -> Markup:
        label = escape(self.label)
        return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(self.parts)}</svg>')


def histogram(found: Histogram, unit: str, shown: Sequence[float] = ()) -> Markup:
    """How many rows have which effect, counts on a logarithmic axis; small marks below are the rows of the lists."""
    most = max(found.counts)
    low, high = found.edges[0], found.edges[-1]
    if low == high:
        low, high = low - 1, low + 1
    top = math.log10(most) + 0.15
    rows = many(sum(found.counts), "row")
    plot = _Plot((low, high), (2 * FOOT, max(top, 0.5)), f"Histogram of the effects of {rows}, in {unit}")
    for power in range(int(math.log10(most)) + 1):
        plot.line("grid", low, power, high, power)
        plot.beside(power, f"{10**power:,}")
    for count, first, last in zip(found.counts, found.edges, found.edges[1:], strict=False):
        if count:
            kind = "up" if (first + last) / 2 > 0 else "down"
            said = f"{many(count, 'row')} from {typeset(first)} to {typeset(last)}"
            plot.box(kind, first, last, FOOT, math.log10(count), said)
    plot.line("axis", low, FOOT, high, FOOT)
    if low < 0 < high:
        plot.line("zero", 0, FOOT, 0, top)
    for value in shown:
        plot.line("tick-up" if value > 0 else "tick-down", value, 2 * FOOT, value, 1.2 * FOOT)
    for value, anchor in ((low, "start"), (high, "end")):
        plot.below(value, _short(value), anchor)
    if low < 0 < high and 0.2 < -low / (high - low) < 0.8:
        plot.below(0, "0")
    plot.below((low + high) / 2, f"effect in {unit}", row=1)
    plot.parts.append(f'<text x="{LEFT - 5}" y="{HEIGHT - BOTTOM + 13}" text-anchor="end">rows</text>')
    return plot.svg()


def curve(found: Curve, unit: str) -> Markup:
    """The effects from the highest to the lowest."""
    low, high = min(0.0, *found.values), max(0.0, *found.values)
    room = 0.06 * ((high - low) or 1)
    plot = _Plot(
        (1, max(2, found.rows)), (low - room, high + room), f"Effects of {many(found.rows, 'row')} in falling order, in {unit}"
    )
    points = list(zip(found.ranks, found.values, strict=True))
    above, below = [p for p in points if p[1] > 0], [p for p in points if p[1] < 0]
    for kind, side in (("up", above), ("down", below)):
        if side:
            plot.path(f"{kind} soft", [(side[0][0], 0), *side, (side[-1][0], 0)], "polygon")
    plot.line("zero", 1, 0, max(2, found.rows), 0)
    for kind, side in (("curve-up", above), ("curve-down", below)):
        if side:
            plot.path(kind, side)
    for value in {high, low}:
        plot.beside(value, _short(value))
    plot.beside(0, "0")
    plot.below(1, "1", "start")
    plot.below(max(2, found.rows), f"{found.rows:,}", "end")
    plot.below((1 + max(2, found.rows)) / 2, "rank", row=0)
    plot.below((1 + max(2, found.rows)) / 2, f"effect in {unit}", row=1)
    return plot.svg()


def lines(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], across: str, label: str) -> Markup:
    """One or two series over a common axis, solid and dashed, each with its name at its end."""
    points = [point for _, part in series for point in part]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    room = 0.08 * ((high - low) or 1)
    plot = _Plot((min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (low - room, high + room), label)
    for value in {low, high}:
        plot.line("grid", min(xs), value, max(xs), value)
        plot.beside(value, f"{value:.3g}")
    for number, (name, part) in enumerate(series):
        plot.path("curve-up" if number == 0 else "curve-down", part)
        if len(part) == 1:
            (x, y), *_ = part
            plot.parts.append('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(*plot.at(x, y)))
        plot.below(min(xs) + (max(xs) - min(xs)) * (0.25 + 0.5 * number), f"{'—' if number == 0 else '- -'} {name}", row=1)
    plot.line("axis", min(xs), low - room, max(xs), low - room)
    plot.below(min(xs), f"{min(xs):g}", "start")
    plot.below(max(xs), f"{across} {max(xs):g}", "end")
    return plot.svg()


def _short(value: float) -> str:
    """A label of two digits, as there is little room."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:+.2g}".replace("-", "−")
    digits, power = f"{value:+.1e}".split("e")
    return f"{digits}×10{power_of_ten(int(power))}".replace("-", "−")
