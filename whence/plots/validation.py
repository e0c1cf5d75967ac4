"""What figures of checks against retraining show: the numbers, from the tables of a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from whence.linalg.stats import agree
from whence.plots.panels import Bars, Lines, Scatter


def scatter_of(title: str, scores_QR: np.ndarray, truth_QR: np.ndarray, truth: str = "measured") -> Scatter:
    """All queries and rows as points, and the mean over queries of the correlation over rows."""
    r = agree(scores_QR, truth_QR).pearson
    return Scatter(title, scores_QR.ravel(), truth_QR.ravel(), r, y_label=f"{truth}, nats per copy")


def agreement_bars(table: Sequence[Mapping[str, Any]]) -> Bars:
    """Pearson's correlation by method and by damping or retraining, with twice its standard error (about 95 %)."""
    group, name = ("damping", "method") if "method" in table[0] else ("retraining", "compared")
    groups = list(dict.fromkeys(row[group] for row in table))
    labels = list(dict.fromkeys(row[name] for row in table))
    found = {(row[group], row[name]): (row["pearson"], 2 * row["pearson_se"]) for row in table}
    points = {key: [found.get((key, label), (math.nan, math.nan)) for label in labels] for key in groups}
    series = {key: [r for r, _ in of] for key, of in points.items()}
    bars = {key: [(r - half, min(r + half, 1.0)) for r, half in of] for key, of in points.items()}
    return Bars("Correlation with the truth", "Pearson, mean over queries; lines: two standard errors", labels, series, bars)


def ladder_bars(table: Sequence[Mapping[str, Any]]) -> list[Bars]:
    """Of the decomposition: the size of each gap, with and without own control, and correlations with influence, by change."""
    panels = []
    size, pearson = "mean |difference|, nats per copy", "Pearson, mean over queries"
    for change in dict.fromkeys(row["change"] for row in table):
        rows = [row for row in table if row["change"] == change]
        steps = [f"{one['objective']} to {two['objective']}" for one, two in zip(rows, rows[1:], strict=False)]
        gaps = {
            "against the own control": [row["gap_to_next"] for row in rows[:-1]],
            "against the trained weights": [row["gap_no_control"] for row in rows[:-1]],
        }
        panels.append(Bars(f"Gaps between objectives at a change of {change}", size, steps, gaps, {}, True))
        correlations = {"with influence": [row["pearson_influence"] for row in rows]}
        labels = [row["objective"] for row in rows]
        panels.append(Bars(f"Correlation with influence at a change of {change}", pearson, labels, correlations))
    return panels


def convergence_lines(table: Sequence[Mapping[str, Any]]) -> Lines:
    """Relative difference between exact influence and the PBRF by the size of the change, one curve per damping."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        size = float(row["change"].removesuffix("/N"))
        curves.setdefault(row["damping"], []).append((size, row["relative_error"]))
    title = "The smaller the change, the nearer the PBRF"
    return Lines(title, "change, copies of the row", "relative error", curves, logarithmic=(True, True))


def interval_bars(table: Sequence[Mapping[str, Any]], value: str, unit: str, title: str = "", base: float = 0.0) -> Bars:
    """One bar per method of a table with the columns method, `value`, and `value`_low and `value`_high (or low and high).

    Bars begin at `base`, what guessing gives.
    """
    low, high = (f"{value}_{end}" if f"{value}_{end}" in table[0] else end for end in ("low", "high"))
    labels, values = [row["method"] for row in table], [row[value] for row in table]
    ends = [(row[low], row[high]) for row in table]
    told = f"{unit}{f', where {base:g} is guessing' if base else ''}; lines: 95 % intervals"
    return Bars(title or unit[:1].upper() + unit[1:], told, labels, {unit: values}, {unit: ends}, base=base)


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
    title, fall = "Retrained without each query's top rows", "fall of log p, nats (bands: 95 %)"
    return Lines(title, "rows removed, %", fall, curves, bands)
