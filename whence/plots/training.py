"""How a training went: loss, learning rate, memory and speed against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whence.plots.style import SERIES, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """Values at the steps where something was measured."""

    steps: list[int]
    values: list[float]


def training_curves(metrics: Sequence[Mapping[str, Any]], learning_rates: Sequence[float]) -> dict[str, Curve]:
    """Losses, memory in GiB and speed from the rows of `metrics.jsonl`, and the learning rate of each step."""
    curves = {}
    for name, column, unit in (
        ("loss", "loss", 1),
        ("eval_loss", "eval_loss", 1),
        ("memory", "memory_bytes", 2**30),
        ("samples_per_second", "samples_per_second", 1),
    ):
        measured = [(row["step"], row[column] / unit) for row in metrics if row[column] is not None]
        curves[name] = Curve([step for step, _ in measured], [value for _, value in measured])
    curves["learning_rate"] = Curve(list(range(1, len(learning_rates) + 1)), [float(rate) for rate in learning_rates])
    return curves


def training_figure(curves: Mapping[str, Curve]) -> Figure:
    """Four panels over the step: losses, learning rate, memory, speed."""
    panels: dict[str, dict[str, str | None]] = {
        "Loss, nats per token in the loss": {"loss": "training", "eval_loss": "rows held out"},
        "Learning rate": {"learning_rate": None},
        "Memory, GiB": {"memory": None},
        "Rows per second": {"samples_per_second": None},
    }
    drawing, every = figure(9.0, 6.0, 2, 2, sharex=True)
    for axes, (title, names) in zip(every, panels.items(), strict=True):
        for (name, label), colour in zip(names.items(), SERIES, strict=False):
            steps, values = curves[name].steps, curves[name].values
            dots = "o" if len(steps) <= 40 else None  # where they are few
            axes.plot(steps, values, color=colour, marker=dots, markersize=3, linewidth=1.4, label=label)
        if len(names) > 1 and all(curves[name].steps for name in names):
            axes.legend(frameon=False)
        axes.set_title(title, loc="left", fontsize=10)
    for axes, name in zip(every[2:], ("memory", "samples_per_second"), strict=True):
        axes.set_ylim(0, 1.08 * max(curves[name].values, default=1.0))
        axes.set_xlabel("step")
    return drawing
