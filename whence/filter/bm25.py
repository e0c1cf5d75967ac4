"""BM25: how well a text answers a query by its words alone, the baseline that is hardest to beat where facts are traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from whence.filter.texts import scores_of_texts, words_of
from whence.store.scores import Scores


def bm25_scores(queries: Sequence[Any], rows: Sequence[Any], k1: float = 1.5, b: float = 0.75) -> Scores:
    """BM25 `[Q, N]`, 0 or more, of every row for every query (Robertson and Zaragoza, 2009); either are texts or `Rows`.

    A row's score adds up, over the query's words, `idf * tf / (tf + k1 (1 - b + b length / mean length))` with
    `idf = log(1 + (N - n + 1/2) / (n + 1/2))` of a word that `n` of `N` documents have, as Lucene and Grosse et al. (2023)
    have it. Words are runs of two or more letters or digits, in lower case, as for TF-IDF.
    """
    return scores_of_texts("BM25", "BM25", queries, rows, lambda asked, texts: _bm25(asked, texts, k1, b))


def _bm25(queries: list[str], documents: list[str], k1: float, b: float) -> np.ndarray:
    import bm25s

    words = [words_of(text) for text in documents]
    found = np.zeros((len(queries), len(documents)))
    if not any(words):
        return found
    index = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64")
    index.index(words, show_progress=False)
    for row, text in enumerate(queries):
        if known := index.get_tokens_ids(words_of(text)):
            found[row] = index.get_scores_from_ids(known)
    return found
