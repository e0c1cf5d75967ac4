"""How much of a ranking is explained by words that query and row share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from whence.filter.tfidf import tfidf_scores
from whence.linalg.stats import spearman

_WORD = re.compile(r"\b\w\w+\b")


class Words:
    """The words of all rows beside those of the queries."""

    def __init__(self, queries: Sequence[str], documents: Sequence[str]):
        self.queries = [set(_words(text)) for text in queries]
        asked = set().union(*self.queries)
        self.documents = Counter(word for text in documents for word in asked & set(_words(text)))
        self.common = max(len(documents) / 2, 2)
        some = any(_words(text) for text in documents)
        self.cosines: np.ndarray | None = tfidf_scores(queries, documents).raw if asked and some else None
        """`[Q, N]`; None where there are no words to compare."""

    def shared(self, query: int, text: str) -> tuple[str, ...]:
        """Words in both the query and a row that most rows have not, those of the fewest rows first."""
        both = {word for word in self.queries[query] & set(_words(text)) if self.documents[word] <= self.common}
        return tuple(sorted(both, key=lambda word: (self.documents[word], word)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's correlation of two series; None where one of them is constant."""
    return None if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearman(x, y))
