"""The quality benchmark's rows as tables and as a plot of LDS against cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from whence.plots.style import SERIES, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

REFERENCE, WORDS, CEILING = "EK-FAC, damping 0.1", "BM25", "retraining, another seed (ceiling)"

KINDS = {
    "lds removals": "Small removals (3 % of the rows, of lm 5 %), same order, batches and steps as the attributed model",
    "lds removals, other seed": "The same removals, retrained from other weights in another order",
    "lds halves": "Random halves, same seed",
    "lds halves, other seed": "Random halves, retrained from other weights in another order",
}

GROUPS = {"exact": 5, "EK-FAC": 0, "Shampoo": 2, "K-FAC": 3, "diagonal": 4, "gradient": 1}
"""Colours, by how a method's name begins; what is left is one more."""

QUICKEST = 0.05
"""Seconds at the left edge of the plot; what takes less is drawn there."""


def markdown(rows: Sequence[Row], about: Mapping[str, Mapping[str, Any]]) -> str:
    """One table per measure, methods by settings; what was measured on; and what the reference is ahead by."""
    lines = ["# How well scores predict retraining", ""]
    lines += [
        "LDS: Spearman's correlation between predicted and retrained query log-likelihoods over subsets, averaged over",
        "queries, with 95 % intervals from resampling queries and subsets together. Seconds: processor time of one thread, fit",
        "and scores. Written by `make quality`; see docs/quality.md for what it means.",
        "",
        "| setting | model | rows | queries | subsets | seconds to retrain |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, own in about.items():
        subsets = " + ".join(str(count) for count in own["subsets"].values())
        lines.append(
            f"| {name} | {own['about']} ({own['parameters']:,} weights) | {own['rows']} | {own['queries']} | {subsets} "
            f"| {own['bank_seconds']:.0f} |"
        )
    for measure, title in KINDS.items():
        lines += ["", f"## {title}", "", *_table(rows, measure, list(about))]
    lines += _slopes(rows, list(about))
    lines += ["", "## Ahead of EK-FAC and of BM25, or behind", "", *_verdicts(rows)]
    lines += ["", "## Price in trainings", "", "Seconds of fit and scores, divided by those of one training.", ""]
    lines += _prices(rows, list(about))
    lines += ["", f"## How far {REFERENCE} is ahead on small removals, paired", "", *_gaps(rows, list(about))]
    lines += _refused(about)
    lines += ["", "![LDS against cost](quality.png)", ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row], measure: str, settings: Sequence[str]) -> list[str]:
    found = {(row["setting"], row["method"]): row for row in rows if row["measure"] == measure}
    methods = list(dict.fromkeys(row["method"] for row in rows if row["measure"] == measure))
    ranked = {name: _best(found, methods, name) for name in settings}
    lines = [f"| method | {' | '.join(settings)} |", "| --- |" + " ---: |" * len(settings)]
    for method in methods:
        cells = []
        for name in settings:
            own = found.get((name, method))
            text = f"{own['value']:.3f} ± {(own['ci_high'] - own['ci_low']) / 2:.3f}" if own else ""
            cells.append(f"**{text}**" if method == ranked[name] else text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


NEAR = 0.15
"""How far from 1 a held-out slope may be for calibrated sizes to be called right."""


def _slopes(rows: Sequence[Row], settings: Sequence[str]) -> list[str]:
    """Whether calibrated predictions have the size of what was measured, for the methods where that was asked."""
    found = {
        (row["measure"], row["method"], row["setting"]): row for row in rows if row["measure"].startswith("held-out slope")
    }
    if not found:
        return []
    lines = ["", "## Held-out slope: are calibrated predictions as large as what was measured?", ""]
    lines += [
        "The gain (measured change for each nat that the scores predict) is made on half of the queries and half of the",
        "subsets, and applied to the other queries on the other subsets; what was measured there is regressed on that through",
        f"0. 1: the sizes are right; in brackets 95 % over queries. **Bold**: not within {NEAR} of 1.",
        "",
        f"| bank | method | {' | '.join(settings)} |",
        "| --- | --- |" + " ---: |" * len(settings),
    ]
    for measure, method in dict.fromkeys((measure, method) for measure, method, _ in found):
        cells = []
        for name in settings:
            own = found.get((measure, method, name))
            text = f"{own['value']:.2f} [{own['ci_low']:.2f}, {own['ci_high']:.2f}]" if own else ""
            cells.append(f"**{text}**" if own and abs(own["value"] - 1) > NEAR else text)
        lines.append(f"| {measure.removeprefix('held-out slope, ')} | {method} | {' | '.join(cells)} |")
    return lines


def _best(found: Mapping[tuple[str, str], Row], methods: Sequence[str], setting: str) -> str:
    own = [method for method in methods if (setting, method) in found and method != CEILING]
    return max(own, key=lambda method: found[setting, method]["value"])


def _gaps(rows: Sequence[Row], settings: Sequence[str]) -> list[str]:
    found = {(row["setting"], row["method"]): row for row in rows if row["measure"] == f"{REFERENCE} ahead, removals"}
    methods = list(dict.fromkeys(method for _, method in found))
    lines = [f"| than | {' | '.join(settings)} |", "| --- |" + " ---: |" * len(settings)]
    for method in methods:
        cells = [
            f"{own['value']:+.3f} [{own['ci_low']:+.3f}, {own['ci_high']:+.3f}]" if (own := found.get((name, method))) else ""
            for name in settings
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """In how many settings a method is beyond doubt ahead of the two that all are held against, and behind (paired, 95 %)."""
    columns = [(other, kind) for other in (REFERENCE, WORDS) for kind in ("removals", "halves")]
    names = [f"{other}, {kind}" for other, kind in columns]
    lines = [
        "Settings in which a method's LDS is beyond doubt (paired, 95 %) above that of the other / below it / neither.",
        "",
        f"| method | {' | '.join(names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for other, kind in columns:
            own = [row for row in rows if row["method"] == method and row["measure"] == f"{other} ahead, {kind}"]
            ahead, behind = sum(row["ci_high"] < 0 for row in own), sum(row["ci_low"] > 0 for row in own)
            cells.append(f"{ahead} / {behind} / {len(own) - ahead - behind}" if own else "")
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _prices(rows: Sequence[Row], settings: Sequence[str]) -> list[str]:
    found = {(row["setting"], row["method"]): row for row in rows if row["measure"] == "lds removals" and "trainings" in row}
    methods = dict.fromkeys(method for _, method in found if method != CEILING)
    lines = [f"| method | {' | '.join(settings)} |", "| --- |" + " ---: |" * len(settings)]
    for method in methods:
        cells = [f"{own['trainings']:.2g}" if (own := found.get((name, method))) else "" for name in settings]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _refused(about: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which methods do not apply to which settings, and why."""
    lines = [f"* {name}, {method}: {why}" for name, own in about.items() for method, why in own.get("refused", {}).items()]
    return ["", "## What does not apply", "", *lines] if lines else []


def points(rows: Sequence[Row], measure: str = "lds removals") -> dict[str, list[Row]]:
    """What is plotted, by setting."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return {name: [row for row in rows if row["setting"] == name and row["measure"] == measure] for name in settings}


LINE = 0.125
"""Inches of a line of the list beside a panel."""


def plot(rows: Sequence[Row], path: Path, measure: str = "lds removals") -> Path:
    """LDS with its interval against processor seconds, one panel per setting; the ceiling as a band."""
    panels = points(rows, measure)
    columns = min(3, len(panels))
    height = max(4.4, 0.8 + LINE * max(map(len, panels.values())))
    drawing = Figure(figsize=(5.6 * columns, height * -(-len(panels) // columns)), layout="constrained")
    grid = np.atleast_1d(drawing.subplots(-(-len(panels) // columns), columns, squeeze=False)).ravel()
    for axes, (name, found) in zip(grid, panels.items(), strict=False):
        tidy(axes)
        axes.set_xscale("log")
        axes.set_xlim(QUICKEST / 2, max(20.0, *(2 * row["seconds"] for row in found if row["method"] != CEILING)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(0, color="#999999", linewidth=0.8)
        for row in found:
            if row["method"] == CEILING:
                axes.axhspan(row["ci_low"], row["ci_high"], color="#eeeeee", zorder=0)
                axes.axhline(row["value"], color="#777777", linewidth=1, linestyle="--", zorder=1)
        listed = sorted((row for row in found if row["method"] != CEILING), key=lambda each: -each["value"])
        for number, row in enumerate(listed, start=1):
            _point(axes, number, row)
        text = "\n".join(f"{n} {_short(row['method'])} {row['value']:.2f}" for n, row in enumerate(listed, start=1))
        axes.text(1.02, 1.0, f"{text}\n- - retrained with another seed", transform=axes.transAxes, fontsize=7, va="top")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("processor seconds, fit and scores", fontsize=8)
        axes.set_ylabel("LDS, small removals", fontsize=8)
        axes.tick_params(labelsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return save(drawing, path)


def _point(axes: Axes, number: int, row: Row) -> None:
    """One method, with its number to the right or to the left by turns."""
    colour, seconds = _colour(row["method"]), max(row["seconds"], QUICKEST)
    down, up = max(0.0, row["value"] - row["ci_low"]), max(0.0, row["ci_high"] - row["value"])
    axes.errorbar(seconds, row["value"], yerr=[[down], [up]], fmt="o", color=colour, markersize=4, elinewidth=1)
    right = number % 2 == 1
    axes.annotate(
        str(number),
        (seconds, row["value"]),
        xytext=(6 if right else -6, 0),
        textcoords="offset points",
        fontsize=7,
        color=colour,
        ha="left" if right else "right",
        va="center",
    )


def _colour(method: str) -> str:
    return next((SERIES[number] for start, number in GROUPS.items() if method.startswith(start)), "#b08080")


def _short(method: str) -> str:
    return re.sub(r", damping (?=\d)", " ", method)
