"""Five pictures of one module's curvature: map, spectrum, two sides, distribution and cumulative share of its eigenvalues.

The eigenvalues of a block are the *entries* of its matrix lambda `[O, I]`: it is sorted and drawn, never decomposed.
docs/inspect.md says how to read each picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from whence.fitting.covariance import Sides
from whence.fitting.health import Health, Side, condition_words, holding, rank_words, refuse_infinite
from whence.plots.style import LOWERS, NEUTRAL, RAISES, SERIES, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 400
"""Rows and columns of a map at most: about what the picture has pixels for."""

POINTS = 2000
"""Points of a curve at most."""

SHARES = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Spectrum:
    """A module's eigenvalues, and the damping that is added to each."""

    module: str
    shape: tuple[int, int]
    values: np.ndarray
    """`[O * I]`, largest first."""
    damping: float
    effective_rank: float

    @property
    def positive(self) -> np.ndarray:
        """Those above zero: what a logarithmic axis can show."""
        return self.values[: int((self.values > 0).sum())]

    @property
    def negative(self) -> int:
        """How many are below zero."""
        return int((self.values < 0).sum())

    @property
    def zero(self) -> int:
        """How many are exactly zero."""
        return int((self.values == 0).sum())


def spectrum(lam_OI: Tensor, health: Health) -> Spectrum:
    """Sort the eigenvalues; raises NumericalError where one is NaN or infinite."""
    refuse_infinite(lam_OI, health.module)
    values = np.sort(lam_OI.detach().cpu().numpy(), axis=None)[::-1]
    return Spectrum(health.module, health.shape, values, health.d, health.effective_rank)


@dataclass(frozen=True)
class LambdaMap:
    """The matrix of eigenvalues, rows and columns in descending order, in cells that are means of blocks where it is large."""

    cells: np.ndarray
    """`[R, C]`"""
    shape: tuple[int, int]
    order: str
    """What rows and columns are sorted by."""
    low: float
    high: float
    """Colours run from `low` to `high`; cells beyond them have the colour of the end."""
    clip_percentile: float

    @property
    def block(self) -> tuple[int, int]:
        """Eigenvalues per cell, downwards and to the right."""
        return tuple(-(-whole // drawn) for whole, drawn in zip(self.shape, self.cells.shape, strict=True))  # pyright: ignore[reportReturnType]


def lambda_map(lam_OI: Tensor, sorted_values: Spectrum, sides: Sides | None, clip_percentile: float = 99.5) -> LambdaMap:
    """Bring lambda into descending order and cut it into at most `CELLS` x `CELLS` cells.

    Rows and columns are sorted by the eigenvalues of the two covariances where they are kept, otherwise by their own sums. The
    colours end at the percentile of the eigenvalues and, at the other end, at 100 minus it of those above zero.
    """
    lam = lam_OI.detach().cpu().numpy()
    if sides:
        by_row, by_column = sides.out_O.cpu().numpy(), sides.in_I.cpu().numpy()
        order = "eigenvalue of its covariance"
    else:
        by_row, by_column = lam.sum(1, dtype=np.float64), lam.sum(0, dtype=np.float64)
        order = "sum of its eigenvalues"
    rows, columns = (np.argsort(-key.astype(np.float64), kind="stable") for key in (by_row, by_column))
    cells = block_means(lam[rows][:, columns], CELLS)
    positive = sorted_values.positive
    low = high = 1.0
    if len(positive):
        low = _percentile(positive, 100 - clip_percentile)
        high = max(_percentile(sorted_values.values, clip_percentile), low)
    return LambdaMap(cells, (lam.shape[0], lam.shape[1]), order, low, high, clip_percentile)


def cumulative(values: np.ndarray, shares: tuple[float, ...] = SHARES) -> tuple[np.ndarray, dict[float, int]]:
    """Share of the sum that the `n` largest hold, `[O * I]`, and how many hold each of the `shares`."""
    sums = np.cumsum(values, dtype=np.float64)
    total = sums[-1]
    return sums / total if total > 0 else sums, {share: holding(sums, share) for share in shares}


@dataclass(frozen=True)
class Distribution:
    """A histogram of the logarithms of the eigenvalues above zero."""

    counts: np.ndarray
    edges: np.ndarray
    """log10, one more than counts."""
    left_out: int
    """Eigenvalues that are zero or negative and have no logarithm."""


def distribution(values: Spectrum, bins: int = 80) -> Distribution:
    """Count eigenvalues in `bins` bins of equal width in log10."""
    positive = values.positive
    counts, edges = np.zeros(bins, int), np.linspace(-1, 0, bins + 1)
    if len(positive):
        counts, edges = np.histogram(np.log10(positive, dtype=np.float64), bins=bins)
    return Distribution(counts, edges, len(values.values) - len(positive))


def draw_lambda(found: LambdaMap, module: str, cmap: str = "viridis") -> Figure:
    """The map of eigenvalues: output directions downwards, input directions to the right, the strongest at the top left."""
    import matplotlib
    from matplotlib.colors import LogNorm

    drawing, (axes,) = figure(7.5, 5.6)
    axes.grid(False)
    spread = 1.0 if found.high > found.low else 10.0  # one value everywhere: in the middle of the scale
    norm = LogNorm(found.low / spread, found.high * spread, clip=True)
    colours = matplotlib.colormaps[cmap].with_extremes(bad="#bbbbbb")
    rows, columns = found.shape
    shown = np.ma.masked_where(found.cells <= 0, found.cells)
    picture = axes.imshow(
        shown, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", extent=(0.5, columns + 0.5, rows + 0.5, 0.5)
    )
    axes.set_title(f"{module}: eigenvalues $\\Lambda$ ({rows:,} x {columns:,}), entry by entry", fontsize=10)
    axes.set_ylabel(f"output direction, by descending {found.order}", fontsize=9)
    down, right = found.block
    cell = "one eigenvalue" if down * right == 1 else f"the mean of up to {down} x {right} eigenvalues"
    lines = [f"input direction, by descending {found.order}", f"each cell is {cell}"]
    if found.clip_percentile < 100:
        ends = f"percentiles {100 - found.clip_percentile:g} and {found.clip_percentile:g}"
        lines.append(f"colours end at {ends} ({found.low:.1e}, {found.high:.1e})")
    if bool(shown.mask.any()):
        lines[-1] += f"; grey: {int(shown.mask.sum()):,} zero or negative"
    axes.set_xlabel("\n".join(lines), fontsize=9)
    extend = "neither" if found.clip_percentile == 100 else "both"
    drawing.colorbar(picture, ax=axes, extend=extend, label="eigenvalue (log colours)")
    return drawing


def draw_spectrum(found: Spectrum) -> Figure:
    """All eigenvalues, largest first: against their rank in logarithms, and against the share of all directions."""
    drawing, (left, right) = figure(9.5, 4.4, columns=2, sharey=True)
    ranks = curve_ranks(len(found.positive))
    even = np.unique(np.linspace(0, max(len(found.positive) - 1, 0), POINTS).astype(int)) if len(ranks) else ranks
    total = len(found.values)
    for axes, at, scale in ((left, ranks, 1.0), (right, even, 100 / total)):
        axes.plot((at + 1) * scale, found.positive[at], color=SERIES[0], marker="." if len(at) < 60 else None)
        rank = f"effective rank {rank_words(found.effective_rank)} ({found.effective_rank / total:.1%})"
        axes.axvline(found.effective_rank * scale, color=NEUTRAL, linestyle=":", label=rank)
        if found.damping > 0:
            axes.axhline(found.damping, color=LOWERS, linestyle="--", label=f"damping d = {found.damping:.2e}")
    if len(ranks):
        left.set(xscale="log", yscale="log")
    left.set(xlabel="rank (log)", ylabel="eigenvalue (log)")
    right.set(xlabel="rank, in % of all directions")
    left.legend(fontsize=8, loc="lower left")
    drawing.suptitle(
        f"{found.module}: {total:,} eigenvalues, largest first{_not_drawn(found.zero, found.negative)}", fontsize=10
    )
    return drawing


def draw_sides(sides: Sides, health: Health) -> Figure:
    """The eigenvalues of the two covariances, largest first."""
    assert health.inputs and health.outputs
    unit = "rows" if sides.by_example else "positions"
    drawing, (left, right) = figure(9.5, 4.2, columns=2)
    _draw_side(left, sides.in_I, health.inputs, f"inputs A, over {health.inputs.samples:,} {unit}", RAISES)
    _draw_side(right, sides.out_O, health.outputs, f"output gradients S, over {health.outputs.samples:,} {unit}", LOWERS)
    drawing.suptitle(f"{health.module}: eigenvalues of both covariances, largest first, without damping", fontsize=10)
    return drawing


def draw_distribution(found: Distribution, values: Spectrum) -> Figure:
    """How many eigenvalues there are of each size, and which of them the damping outweighs."""
    drawing, (axes,) = figure()
    colours = np.where(10 ** ((found.edges[1:] + found.edges[:-1]) / 2) > values.damping, RAISES, "#b9c9da")
    axes.bar(found.edges[:-1], found.counts, width=np.diff(found.edges), align="edge", color=colours)
    total = len(values.values)
    if values.damping > 0:
        share = int((values.values > values.damping).sum()) / total
        label = f"damping d = {values.damping:.2e}; {share:.1%} above it"
        axes.axvline(np.log10(values.damping), color=LOWERS, linestyle="--", label=label)
        axes.legend(fontsize=8)
    axes.set(xlabel="log10 of the eigenvalue", ylabel="eigenvalues")
    axes.set_title(f"{values.module}: {total:,} eigenvalues by size{_not_drawn(values.zero, values.negative)}", fontsize=10)
    return drawing


def draw_cumulative(found: Spectrum) -> Figure:
    """What share of the sum the largest eigenvalues hold."""
    drawing, (axes,) = figure()
    shares, marks = cumulative(found.values)
    at = curve_ranks(len(shares))
    axes.plot(at + 1, 100 * shares[at], color=SERIES[0])
    total = len(shares)
    for (share, count), colour in zip(marks.items(), SERIES[1:], strict=False):
        label = f"{share:.0%} in the largest {count:,} ({count / total:.2%})"
        axes.plot([count], [100 * share], "o", color=colour, label=label)
        axes.vlines(count, 0, 100 * share, color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="largest eigenvalues (log)", ylabel="share of the sum of all (%)", ylim=(0, 103))
    axes.legend(fontsize=8, loc="lower right" if marks[SHARES[0]] < total**0.5 else "upper left")
    axes.set_title(f"{found.module}: cumulative share of {total:,} eigenvalues", fontsize=10)
    return drawing


def curve_ranks(count: int) -> np.ndarray:
    """At most `POINTS` places of `count`, the first ones all and the rest even in logarithms."""
    if count <= POINTS:
        return np.arange(count)
    return np.unique(np.concatenate([np.arange(100), np.geomspace(100, count, POINTS - 100).astype(int) - 1]))


def _draw_side(axes: Axes, values: Tensor, side: Side, title: str, colour: str) -> None:
    ordered = np.sort(values.double().cpu().numpy())[::-1]
    positive = ordered[ordered > 0]
    at = curve_ranks(len(positive))
    axes.plot(at + 1, positive[at], color=colour, marker="." if len(at) < 60 else None)
    if side.rank < side.width:
        axes.axvline(side.rank, color=NEUTRAL, linestyle=":", label=f"rank {side.rank:,} of {side.width:,}")
        axes.legend(fontsize=8, loc="lower left")
    if len(positive):
        axes.set_yscale("log")
    finite = np.isfinite(side.condition)
    condition = f"condition {condition_words(side.condition)}" if finite else "singular to working precision"
    axes.set_title(f"{title}\n{condition}{_not_drawn(int((ordered == 0).sum()), 0)}", fontsize=9)
    axes.set(xlabel="rank", ylabel="eigenvalue (log)")


def _not_drawn(zero: int, negative: int) -> str:
    said = " and ".join(f"{count:,} {what}" for what, count in (("zero", zero), ("negative", negative)) if count)
    return f"; {said} not drawn" if said else ""


def block_means(matrix: np.ndarray, cells: int) -> np.ndarray:
    """Means over blocks of rows and columns that are as equal as possible, at most `cells` in either direction."""
    for axis in (0, 1):
        count = matrix.shape[axis]
        edges = np.linspace(0, count, min(cells, count) + 1).astype(int)
        sizes = np.expand_dims(np.diff(edges), 1 - axis)
        matrix = np.add.reduceat(matrix, edges[:-1], axis=axis, dtype=np.float64) / sizes
    return matrix


def _percentile(descending: np.ndarray, percentile: float) -> float:
    """The percentile of sorted values, interpolated linearly as `np.percentile` does."""
    place = (len(descending) - 1) * (1 - percentile / 100)
    below, above = int(np.floor(place)), int(np.ceil(place))
    return float(descending[below] + (descending[above] - descending[below]) * (place - below))
