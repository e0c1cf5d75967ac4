"""Negative controls: rankings that know nothing about the answer, beside the one that claims to.

Each control is a matrix of scores like the method's own: sizes of gradients, words in common, chance, and the scores of
another question, or of the same question in another form. What they explain of a ranking needs no attribution; where a
truth is known, a method that does not beat them is flagged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from whence.errors import UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.linalg.stats import Interval, bootstrap, spearman
from whence.store.scores import Scores

TOP = 10
"""Rows whose overlap is counted."""

EXPLAINED = 0.9
"""Rank correlation, or overlap of the first rows, from which on a control explains the whole ranking."""

NORM, UNRELATED, SWAPPED = "gradient norm", "unrelated query", "other format"

Measure = Callable[[np.ndarray], np.ndarray]
"""How good scores `[Q, N]` are for each query, `[Q]`; higher is better (an LDS, a reciprocal rank)."""


@dataclass(frozen=True)
class Control:
    """What one control explains of the method's ranking: means over the queries, with 95 % intervals."""

    name: str
    correlation: Interval
    """Spearman's, of the scores with the control's."""
    sizes: Interval
    """Spearman's, of the scores' absolute values with the control's."""
    overlap: Interval
    """Share of the first `TOP` rows that are among the control's."""
    quality: Interval | None = None
    """What the control reaches where a truth is known."""
    lead: Interval | None = None
    """By how much the method is better, query by query."""

    @property
    def beaten(self) -> bool | None:
        """Whether the method is better than the control beyond doubt; None where no truth is known, or one query only."""
        return None if self.lead is None or math.isnan(self.lead.low) else self.lead.low > 0


@dataclass(frozen=True)
class Controls:
    """The controls of one method, and what is known of the truth."""

    controls: tuple[Control, ...]
    queries: int
    rows: int
    truth: str = ""
    """What the quality is; empty where no truth is known."""
    quality: Interval | None = None
    """The method's own."""

    @property
    def flags(self) -> list[str]:
        """What speaks against the ranking."""
        found = []
        for control in self.controls:
            if control.correlation.mean >= EXPLAINED or control.overlap.mean >= EXPLAINED:
                found.append(
                    f"{control.name} alone gives nearly this ranking (rank correlation {control.correlation.mean:.2f}, "
                    f"top-{TOP} overlap {control.overlap.mean:.2f})"
                )
            elif control.name == NORM and control.sizes.mean >= EXPLAINED:
                found.append(
                    f"the sizes of the scores are those of the rows' gradients (rank correlation {control.sizes.mean:.2f}): "
                    f"try --norm cosine or relatif"
                )
            if control.beaten is False and control.name != SWAPPED and control.lead and control.quality:
                found.append(
                    f"not better than {control.name}: {self.truth} {_interval(self.quality)} against "
                    f"{_interval(control.quality)}, lead {_interval(control.lead)}"
                )
        named = {control.name: control for control in self.controls}
        if UNRELATED in named and SWAPPED in named:
            other, same = named[UNRELATED].correlation, named[SWAPPED].correlation
            if same.mean <= other.mean:
                found.append(
                    f"the ranking follows the form of the question, not what it asks: rank correlation {same.mean:.2f} with "
                    f"the same question in another format, {other.mean:.2f} with another question"
                )
        return found

    def table(self) -> list[dict[str, Any]]:
        """One row per control."""
        rows = []
        for control in self.controls:
            row: dict[str, Any] = {"control": control.name}
            for key in ("correlation", "sizes", "overlap", "quality", "lead"):
                interval: Interval | None = getattr(control, key)
                if interval is not None:
                    row |= {key: interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}
            rows.append(row | ({} if control.beaten is None else {"beaten": control.beaten}))
        return rows

    def summary(self) -> list[str]:
        """Lines for people."""
        chance = min(TOP, self.rows) / self.rows
        lines = [
            f"What needs no attribution ({self.queries} queries, {self.rows:,} rows; chance has an overlap of {chance:.2f})"
        ]
        for control in self.controls:
            line = (
                f"  {control.name:<16} rank correlation {_interval(control.correlation)}  top-{TOP} {control.overlap.mean:.2f}"
            )
            if control.quality is not None:
                line += f"  {self.truth} {_interval(control.quality)}"
            lines.append(line)
        if self.quality is not None:
            lines.append(f"  {'the method':<16} {self.truth} {_interval(self.quality)}")
        return [*lines, *(f"  FLAG {flag}" for flag in self.flags)]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        own = {"check": "controls", **asdict(self)}
        return {**own, "summary": self.summary(), "tables": {"": self.table()}, "flags": self.flags}


def controls(
    scores: Scores,
    others: Mapping[str, np.ndarray] | None = None,
    *,
    truth: Measure | None = None,
    truth_name: str = "quality",
    seed: int = 0,
) -> Controls:
    """Compare scores with what needs no attribution: words, chance, and the `others`, matrices `[Q, N]` by name.

    Without `others` these are the gradients' norms, if they were kept, and each query's scores for another query of the
    same scores. `truth` tells how good a matrix of scores is, query by query (the reciprocal rank of a known source, say, or
    an LDS against a bank); a control that the method does not beat, beyond the 95 % interval of the
    paired difference over the queries, is flagged.
    """
    raw, given = scores.raw, dict(others or {})
    if others is None:
        given = _at_hand(scores)
    words = _words(scores)
    draw = np.random.default_rng([seed, 1])
    given |= words | {"random": draw.standard_normal(raw.shape)}
    for name, matrix in given.items():
        if matrix.shape != raw.shape:
            raise UsageError(f"The control {name!r} is of another shape.", given=str(matrix.shape), accepted=str(raw.shape))
    own = truth(raw) if truth else None
    found = [_control(name, matrix, raw, truth(matrix) if truth else None, own) for name, matrix in given.items()]
    quality = bootstrap(own) if own is not None else None
    return Controls(tuple(found), raw.shape[0], raw.shape[1], truth_name if truth else "", quality)


def best_rank(scores: np.ndarray, sources: Sequence[int]) -> int:
    """The rank of the best source among the rows `[N]` that are none; ties count against it: not telling is no merit."""
    best = scores[list(sources)].max()
    return int((np.delete(scores, list(sources)) >= best).sum()) + 1


def top_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of the `k` highest of `a [N]` that are among the `k` highest of `b`."""
    return len(set(np.argsort(-a, kind="stable")[:k]) & set(np.argsort(-b, kind="stable")[:k])) / k


def _words(scores: Scores) -> dict[str, np.ndarray]:
    """BM25 and TF-IDF between the texts of queries and rows; nothing where they are no text."""
    asked, documents = ([str(text) for text in table["text"]] for table in (scores.queries, scores.examples))
    if not _any_words(documents) or not _any_words(asked):
        return {}
    return {"BM25": bm25_scores(asked, documents).raw, "TF-IDF": tfidf_scores(asked, documents).raw}


def _any_words(texts: Sequence[str]) -> bool:
    return any(re.search(r"\b\w\w", text) for text in texts)


def _at_hand(scores: Scores) -> dict[str, np.ndarray]:
    """The controls that finished scores hold themselves."""
    found = {}
    if "gradient" in scores.norms:
        found[NORM] = np.broadcast_to(scores.norms["gradient"], scores.raw.shape)
    if len(scores.raw) > 1:
        found[UNRELATED] = scores.raw[_least_alike(scores)]
    return found


def _least_alike(scores: Scores) -> np.ndarray:
    """Of each query the other one that shares the fewest words with it, `[Q]`; the next one where none has words."""
    texts = [str(text) for text in scores.queries["text"]]
    count = len(texts)
    following = (np.arange(count) + 1) % count
    if not _any_words(texts):
        return following
    alike = tfidf_scores(texts, texts).raw
    np.fill_diagonal(alike, np.inf)
    alike[np.arange(count), following] -= 1e-9  # of several that share nothing the next one, so that not all get the same
    return alike.argmin(1)


def _control(name: str, matrix: np.ndarray, raw: np.ndarray, reached: np.ndarray | None, own: np.ndarray | None) -> Control:
    k = min(TOP, raw.shape[1])
    pairs = list(zip(raw, matrix, strict=True))
    lead = own - reached if own is not None and reached is not None else None
    return Control(
        name,
        correlation=bootstrap(spearman(raw, matrix)),
        sizes=bootstrap(spearman(np.abs(raw), matrix)),
        overlap=bootstrap(np.array([top_overlap(row, other, k) for row, other in pairs])),
        quality=bootstrap(reached) if reached is not None else None,
        lead=bootstrap(lead) if lead is not None else None,
    )


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval.mean:.2f}" + (f" ({interval.low:.2f} to {interval.high:.2f})" if not math.isnan(interval.low) else "")
