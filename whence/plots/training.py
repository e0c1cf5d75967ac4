"""How a training went: loss, learning rate, memory and speed against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whence.plots.style import SERIES, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.0, 6.0), layout="constrained")
    loss, rate, memory, speed = drawing.subplots(2, 2, sharex=True).flat
    _draw(loss, curves["loss"], SERIES[0], label="training")
    _draw(loss, curves["eval_loss"], SERIES[1], label="rows kept out")
    if curves["loss"].steps and curves["eval_loss"].steps:
        loss.legend(frameon=False)
    _draw(rate, curves["learning_rate"], SERIES[0])
    _draw(memory, curves["memory"], SERIES[0])
    _draw(speed, curves["samples_per_second"], SERIES[0])
    for axes, name in ((memory, "memory"), (speed, "samples_per_second")):
        axes.set_ylim(0, 1.08 * max(curves[name].values, default=1.0))
    for axes, title in (
        (loss, "Loss, nats per token in the loss"),
        (rate, "Learning rate"),
        (memory, "Memory, GiB"),
        (speed, "Rows per second"),
    ):
        tidy(axes)
        axes.set_title(title, loc="left", fontsize=10)
    for axes in (memory, speed):
        axes.set_xlabel("step")
    return drawing


def _draw(axes: Axes, curve: Curve, colour: str, label: str | None = None) -> None:
    """A line, with a dot at each measurement where they are few."""
    dots = "o" if len(curve.steps) <= 40 else None
    axes.plot(curve.steps, curve.values, color=colour, marker=dots, markersize=3, linewidth=1.4, label=label)
