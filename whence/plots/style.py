"""How all figures look: matplotlib without a window or global state, colours that the colour-blind can tell apart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.store.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAISES, LOWERS, NEUTRAL = "#1f6fb4", "#c8601a", "#6b6b6b"
"""Blue raises, orange lowers."""

SERIES = ("#1f6fb4", "#c8601a", "#3d8f5f", "#8c5aa8", "#6b6b6b", "#b0892e")


def figure(width: float = 7.0, height: float = 4.2, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches with `rows` x `columns` axes, line by line; `more` is for `subplots`."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    every = list(drawing.subplots(rows, columns, squeeze=False, **more).flat) if rows and columns else []
    for axes in every:
        tidy(axes)
    return drawing, every


def tidy(axes: Axes) -> None:
    """A light grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def save(drawing: Figure, path: Path) -> Path:
    """Write the figure as its ending says (.png, .svg, .pdf), whole or not at all."""
    drawn = io.BytesIO()
    drawing.savefig(drawn, format=path.suffix.removeprefix("."), dpi=150)
    with atomic(path) as temporary:
        temporary.write_bytes(drawn.getvalue())
    return path
