"""What words alone say, counted one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from benchmarks.oracles.base import Case
from whence.store.scores import row_text


def bm25(case: Case, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """`sum_w idf(w) tf / (tf + k1 (1 - b + b length / mean length))` over the query's words (Robertson and Zaragoza 2009)."""
    queries, rows = (_words(side) for side in (case.queries, case.rows))
    mean = sum(map(len, rows)) / len(rows)

    def score(query: list[str], row: list[str]) -> float:
        size = k1 * (1 - b + b * len(row) / mean)
        return sum(_idf(word, rows, 0.5) * row.count(word) / (row.count(word) + size) for word in query)

    return np.array([[score(query, row) for row in rows] for query in queries])


def tfidf(case: Case) -> np.ndarray:
    """Cosines of `tf * (1 + log((1 + N) / (1 + n)))`."""
    queries, rows = (_words(side) for side in (case.queries, case.rows))
    known = sorted({word for row in rows for word in row})

    def vector(text: list[str]) -> np.ndarray:
        weights = [1 + math.log((1 + len(rows)) / (1 + sum(word in row for row in rows))) for word in known]
        found = np.array([text.count(word) for word in known]) * weights
        return found / max(np.linalg.norm(found), 1e-300)

    return np.array([[vector(query) @ vector(row) for row in rows] for query in queries])


def _idf(word: str, rows: Sequence[Sequence[str]], half: float) -> float:
    n = sum(word in row for row in rows)
    return math.log(1 + (len(rows) - n + half) / (n + half))


def _words(side: Sequence[object]) -> list[list[str]]:
    return [re.findall(r"\b\w\w+\b", row_text(row).lower()) for row in side]


ORACLES = {"bm25": bm25, "tfidf": tfidf}
