"""Rows of `benchmarks.quality.evaluate` as a table: a method a line, a measure with its interval a column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.quality import Row


def side_by_side(rows: Sequence[Row], measures: Iterable[str]) -> list[Row]:
    """Methods by the first measure, the best first, and what each costs in trainings."""
    first, *others = measures
    found = {(row["method"], row["measure"]): shown(row["value"], row["ci_low"], row["ci_high"]) for row in rows}
    best_first = sorted((row for row in rows if row["measure"] == first), key=lambda row: -row["value"])
    return [
        {
            "method": row["method"],
            **{measure: found[key] for measure in (first, *others) if (key := (row["method"], measure)) in found},
            "trainings": float(f"{row['trainings']:.2g}"),
        }
        for row in best_first
    ]


def shown(value: float, low: float, high: float) -> str:
    """A value with its 95 % interval."""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
