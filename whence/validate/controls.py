"""Negative controls: rankings that know nothing about the answer, beside the one that claims to.

Each control is a matrix of scores like the method's own: sizes of gradients, words in common, chance, and the scores of
another question, or of the same question in another form. What they explain of a ranking needs no attribution; where a
truth is known, a method that does not beat them is flagged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from whence.errors import UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.linalg.stats import Interval, bootstrap, spearman
from whence.store.scores import Scores
from whence.validate.results import Result

TOP = 10
"""Rows whose overlap is counted."""

EXPLAINED = 0.9
"""Rank correlation, or overlap of the first rows, from which on a control explains the whole ranking."""

NORM, UNRELATED, SWAPPED = "gradient norm", "unrelated query", "other format"

Measure = Callable[[np.ndarray], np.ndarray]
"""How good scores `[Q, N]` are for each query, `[Q]`; higher is better (an LDS, a reciprocal rank)."""


def controls(
    scores: Scores,
    others: Mapping[str, np.ndarray] | None = None,
    *,
    truth: Measure | None = None,
    truth_name: str = "quality",
    seed: int = 0,
) -> Result:
    """Compare scores with what needs no attribution: words, chance, and the `others`, matrices `[Q, N]` by name.

    Without `others` these are the gradients' norms, if they were kept, and each query's scores for another query of the
    same scores. `truth` tells how good a matrix of scores is, query by query (the reciprocal rank of a known source, say, or
    an LDS against a bank): a control is flagged where the 95 % interval of the paired difference to it over the queries is not
    above 0.
    """
    raw, given = scores.raw, dict(others or {})
    if others is None and "gradient" in scores.norms:
        given[NORM] = np.broadcast_to(scores.norms["gradient"], raw.shape)
    if others is None and len(raw) > 1:
        given[UNRELATED] = raw[_least_alike(scores)]
    words = _words(scores)
    draw = np.random.default_rng([seed, 1])
    given |= words | {"random": draw.standard_normal(raw.shape)}
    for name, matrix in given.items():
        if matrix.shape != raw.shape:
            raise UsageError(f"The control {name!r} is of another shape.", given=str(matrix.shape), accepted=str(raw.shape))
    own = truth(raw) if truth else None
    found = {name: _compared(raw, matrix, own, truth) for name, matrix in given.items()}
    quality, told = bootstrap(own) if own is not None else None, truth_name if truth else ""
    queries, rows = raw.shape
    says = [
        f"What needs no attribution ({queries} queries, {rows:,} rows; chance has an overlap of {min(TOP, rows) / rows:.2f})"
    ]
    table = []
    for name, intervals in found.items():
        row: dict[str, Any] = {"control": name}
        for key, interval in intervals.items():
            row |= interval.columns(key) if interval else {}
        lead = intervals["lead"]
        table.append(row | ({} if lead is None or math.isnan(lead.low) else {"beaten": lead.low > 0}))
        line = f"  {name:<16} rank correlation {_interval(intervals['correlation'])}  top-{TOP} {row['overlap']:.2f}"
        says.append(line + (f"  {told} {_interval(intervals['quality'])}" if own is not None else ""))
    if quality is not None:
        says.append(f"  {'the method':<16} {told} {_interval(quality)}")
    flags = _flags(found, told, quality)
    about = {
        "controls": [
            {"name": name} | {key: interval and interval.as_dict() for key, interval in intervals.items()}
            for name, intervals in found.items()
        ],
        "queries": queries,
        "rows": rows,
        "truth": told,
        "quality": quality and quality.as_dict(),
    }
    return Result("controls", about, {"": table}, [*says, *(f"  FLAG {flag}" for flag in flags)], flags)


def _compared(raw: np.ndarray, matrix: np.ndarray, own: np.ndarray | None, truth: Measure | None) -> dict[str, Any]:
    """What a control explains of the scores: means over the queries.

    Spearman's correlation with them, and with their sizes; the share of their first `TOP` rows that are its own; where a truth
    is known what the control reaches, and by how much the method is better.
    """
    k, reached = min(TOP, raw.shape[1]), truth(matrix) if truth else None
    return {
        "correlation": bootstrap(spearman(raw, matrix)),
        "sizes": bootstrap(spearman(np.abs(raw), matrix)),
        "overlap": bootstrap(np.array([top_overlap(row, other, k) for row, other in zip(raw, matrix, strict=True)])),
        "quality": bootstrap(reached) if reached is not None else None,
        "lead": bootstrap(own - reached) if own is not None and reached is not None else None,
    }


def _flags(found: Mapping[str, Mapping[str, Any]], truth: str, quality: Interval | None) -> list[str]:
    """Evidence against the ranking."""
    flags = []
    for name, own in found.items():
        correlation, sizes, overlap, lead = (own[key] for key in ("correlation", "sizes", "overlap", "lead"))
        if correlation.mean >= EXPLAINED or overlap.mean >= EXPLAINED:
            flags.append(
                f"{name} alone gives nearly this ranking (rank correlation {correlation.mean:.2f}, "
                f"top-{TOP} overlap {overlap.mean:.2f})"
            )
        elif name == NORM and sizes.mean >= EXPLAINED:
            flags.append(
                f"the sizes of the scores are those of the rows' gradients (rank correlation {sizes.mean:.2f}): "
                f"try --norm cosine or relatif"
            )
        if lead and lead.low <= 0 and name != SWAPPED:
            flags.append(
                f"not better than {name}: {truth} {_interval(quality)} against {_interval(own['quality'])}, "
                f"lead {_interval(lead)}"
            )
    if UNRELATED in found and SWAPPED in found:
        other, same = found[UNRELATED]["correlation"], found[SWAPPED]["correlation"]
        if same.mean <= other.mean:
            flags.append(
                f"the ranking follows the form of the question, not what it asks: rank correlation {same.mean:.2f} with "
                f"the same question in another format, {other.mean:.2f} with another question"
            )
    return flags


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


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval.mean:.2f}" + (f" ({interval.low:.2f} to {interval.high:.2f})" if not math.isnan(interval.low) else "")
