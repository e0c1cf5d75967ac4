"""How alike two sets of scores put the same rows in order, whatever their units: rank correlation, overlap, rows that moved.

`Q` queries, `N` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.errors import UsageError
from whence.linalg.stats import bootstrap, spearman, top_overlap
from whence.store.scores import Scores, part_of

if TYPE_CHECKING:
    import pandas

TOPS = (10, 100)
"""Sizes of the tops whose overlap is reported, where there are more rows than that."""


@dataclass(frozen=True)
class Agreement:
    """Two sets of scores of the same queries and rows."""

    a: Scores
    b: Scores
    tops: tuple[int, ...] = TOPS

    @property
    def ids(self) -> list[str]:
        """Of the queries."""
        return self.a.query_ids

    @property
    def sizes(self) -> list[int]:
        """Of the tops that are less than all rows."""
        return [k for k in self.tops if k < self.a.shape[1]]

    @property
    def spearman(self) -> np.ndarray:
        """Rank correlation over the rows that both have scored, `[Q]`."""
        pairs = (self._scored(query) for query in range(len(self.ids)))
        return np.array([float(spearman(a, b)) if len(a) > 1 else np.nan for a, b in pairs])

    def overlap(self, k: int) -> np.ndarray:
        """Share of the `k` highest rows of one that are among the `k` highest of the other, `[Q]`; chance is about k / N."""
        pairs = (self._scored(query) for query in range(len(self.ids)))
        return np.array([top_overlap(a, b, min(k, len(a))) if len(a) else np.nan for a, b in pairs])

    def means(self) -> dict[str, float]:
        """Rank correlation and overlaps, in the mean over queries."""
        return {"spearman": _mean(self.spearman)} | {f"overlap@{k}": _mean(self.overlap(k)) for k in self.sizes}

    def interval(self) -> tuple[float, float]:
        """Of the mean rank correlation: 95 %, from queries drawn again; not numbers for a single query."""
        found = bootstrap(self.spearman)
        return found.low, found.high

    def moved(self, query: int, k: int = 5) -> pandas.DataFrame:
        """The rows that moved most: their ranks in both, 1 for the highest, and their columns.

        From 1 to 10 is as far as from 100 to 1,000: what changes places at the end of the order is of no interest.
        """
        import pandas

        places_a, places_b = _places(self.a.raw[query]), _places(self.b.raw[query])
        both = np.isfinite(self.a.raw[query]) & np.isfinite(self.b.raw[query])
        distance = np.where(both, np.abs(np.log(places_a / places_b)), 0.0)
        order = [row for row in np.argsort(-distance, kind="stable")[:k] if distance[row] > 0]
        table = pandas.DataFrame({"rank_a": places_a[order], "rank_b": places_b[order]})
        rest = self.a.examples.iloc[order].reset_index(drop=True).drop(columns="pieces", errors="ignore")
        return pandas.concat([table, rest], axis=1)

    def as_json(self, k: int = 5) -> dict[str, Any]:
        """Everything, with the `k` rows of each query that moved most."""
        rho, overlaps = self.spearman, {size: self.overlap(size) for size in self.sizes}
        queries = [
            {
                "id": name,
                "text": str(self.a.queries["text"].iloc[number]),
                "spearman": _number(rho[number]),
                **{f"overlap@{size}": _number(found[number]) for size, found in overlaps.items()},
                "moved": [
                    {key: None if value != value else value for key, value in row.items()}
                    for row in self.moved(number, k).to_dict("records")
                ],
            }
            for number, name in enumerate(self.ids)
        ]
        means = {name: _number(value) for name, value in self.means().items()}
        low, high = self.interval()
        return {**means, "spearman_low": _number(low), "spearman_high": _number(high), "queries": queries}

    def _scored(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Both scores of the rows that both have scored."""
        a, b = self.a.raw[query], self.b.raw[query]
        both = np.isfinite(a) & np.isfinite(b)
        return a[both], b[both]


def agreement(a: Scores, b: Scores, tops: Sequence[int] = TOPS) -> Agreement:
    """Compare the queries and rows that both have, in the order of `a`; they belong together by id.

    Raises UsageError where none are in common.
    """
    kept = {}
    for what, mine, theirs in (("queries", a.query_ids, b.query_ids), ("rows", a.example_ids, b.example_ids)):
        known = set(theirs)
        kept[what] = [name for name in mine if name in known]
        if not kept[what]:
            raise UsageError(
                f"These scores have no {what} in common.",
                given=f"{len(mine):,} {what} such as {mine[0]}, and {len(theirs):,} such as {theirs[0]}",
                accepted=f"scores of the same {what}: those with the same ids",
            )
    return Agreement(only(a, **kept), only(b, **kept), tuple(tops))


def only(scores: Scores, queries: Sequence[str], rows: Sequence[str]) -> Scores:
    """The scores of these queries and rows, by id and in this order; what belongs to tokens and modules is left out."""
    if list(queries) == scores.query_ids and list(rows) == scores.example_ids:
        return scores
    asked, scored = ({name: place for place, name in enumerate(ids)} for ids in (scores.query_ids, scores.example_ids))
    whole = replace(scores, modules={}, tokens=None)
    return part_of(whole, [asked[name] for name in queries], [scored[name] for name in rows])


def _places(raw: np.ndarray) -> np.ndarray:
    """Each row's place, 1 for the highest, `[N]`."""
    return np.argsort(np.argsort(-raw, kind="stable"), kind="stable") + 1


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
