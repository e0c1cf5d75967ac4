"""Two models beside each other: accuracy on a benchmark, and likeness of their answers to references and to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from whence.plots.style import NEUTRAL, RAISES, SERIES, tidy

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float, float] | None
"""Mean, low and high end of its interval (NaN where there is none); None where nothing was measured."""

LABELS = {"bleu": "BLEU / 100", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
COLOURS = {"base": NEUTRAL, "tuned": RAISES}
MARKERS = {"base": "s", "tuned": "o"}


@dataclass(frozen=True)
class Panel:
    """Points with intervals, one row per label, and a series of them per model."""

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[Point]]
    chance: list[float] = field(default_factory=list)
    """What guessing gives, per label."""
    around_zero: bool = False
    """The points are differences: zero means none."""


def comparison_panels(summary: pandas.DataFrame) -> list[Panel]:
    """Panels of a comparison's summary: likeness to the references, its difference, and likeness of both models' answers."""

    def prompts(*of: str) -> int:
        return max(row["n"] for row in records(summary) if row["of"] in of and row["measure"] in LABELS)

    def points(of: str) -> list[Point]:
        found = {row["measure"]: row for row in records(summary) if row["of"] == of}
        return [
            tuple(found[name][end] / (100 if name == "bleu" else 1) for end in ("mean", "low", "high"))
            if name in found
            else None
            for name in LABELS
        ]

    labels, panels = list(LABELS.values()), []
    against = {who: points(who) for who in ("base", "tuned") if any(points(who))}
    if against:
        panels.append(Panel("Answers against the references", f"mean over {prompts(*against)} prompts", labels, against))
    if any(points("tuned minus base")):
        difference = {"tuned minus base": points("tuned minus base")}
        panels.append(
            Panel("Tuned minus base, on the same prompts", "difference of means", labels, difference, around_zero=True)
        )
    if any(points("base against tuned")):
        alike = {"base against tuned": points("base against tuned")}
        panels.append(Panel("How alike base and tuned answers are", f"mean over {prompts(*alike)} prompts", labels, alike))
    return panels


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table."""
    return table.to_dict("records")


def benchmark_panels(document: Mapping[str, Any]) -> list[Panel]:
    """Panels of a benchmark: accuracy per task, and the difference of two models on the same questions."""
    results = document["results"]
    tasks = list(dict.fromkeys(row["task"] for row in results))
    named = {(row["task"], row["model"]): row for row in results}
    models = list(dict.fromkeys(row["model"] for row in results))
    sizes = {row["task"]: row["n"] for row in results}
    labels = [f"{task.removeprefix('mmlu_').replace('_', ' ')} ({sizes[task]})" for task in tasks]
    series = {name: [_point(named.get((task, name)), "accuracy") for task in tasks] for name in models}
    chance = [next(row["chance"] for row in results if row["task"] == task) for task in tasks]
    panels = [Panel("Accuracy (number of questions)", "share answered correctly", labels, series, chance)]
    differences = {row["task"]: row for row in document["differences"]}
    if differences:
        of = next(iter(differences.values()))["of"]
        points = [_point(differences.get(task), "difference") for task in tasks]
        title = f"{of.capitalize()}, on the same questions"
        panels.append(Panel(title, "difference of accuracies", labels, {of: points}, around_zero=True))
    return panels


def draw(panels: Sequence[Panel]) -> Figure:
    """Draw panels below each other; bars are 95 % intervals."""
    from matplotlib.figure import Figure

    heights = [0.9 + 0.36 * len(panel.labels) for panel in panels] or [1.5]
    drawing = Figure(figsize=(7.2, 0.6 + sum(heights)), layout="constrained")
    if not panels:
        drawing.text(0.5, 0.5, "nothing to compare: no references, and no answers of a base model", ha="center", color=NEUTRAL)
        return drawing
    axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel)
    drawing.supxlabel("bars: 95 % intervals", fontsize=8, color=NEUTRAL)
    return drawing


def _point(row: Mapping[str, Any] | None, key: str) -> Point:
    return None if row is None else (row[key], row["low"], row["high"])


def _draw(axes: Axes, panel: Panel) -> None:
    tidy(axes)
    for number, (name, points) in enumerate(panel.series.items()):
        offset = 0.16 * (2 * number - (len(panel.series) - 1))
        colour = COLOURS.get(name, SERIES[2 + number % 4])
        marker, label = MARKERS.get(name, "D"), name
        for row, point in enumerate(points):
            if point is not None:
                mean, low, high = point
                axes.plot([low, high], [row + offset] * 2, color=colour, linewidth=2, solid_capstyle="butt")
                axes.plot([mean], [row + offset], marker, color=colour, markersize=6, label=label)
                label = None
    for row, chance in enumerate(panel.chance):
        label = "guessing" if row == 0 else None
        axes.plot(
            [chance] * 2, [row - 0.42, row + 0.42], color=SERIES[1], linestyle=":", linewidth=1.8, label=label, zorder=1.5
        )
    if panel.around_zero:
        axes.axvline(0, color="black", linewidth=1, zorder=1.5)
    else:
        axes.set_xlim(left=0)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(panel.labels) - 0.4, -0.6)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(panel.unit, fontsize=9)
    if len(panel.series) > 1 or panel.chance:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
