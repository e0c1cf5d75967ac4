"""TF-IDF: how similar two texts are in their words, the baseline that any attribution has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from whence.filter.texts import scores_of_texts
from whence.store.scores import Scores


def tfidf_scores(queries: Sequence[Any], rows: Sequence[Any]) -> Scores:
    """Cosines `[Q, N]` in [0, 1] between the TF-IDF vectors of queries and rows (Salton and Buckley, 1988); texts or `Rows`.

    Term frequencies enter as they are, inverse document frequencies come from the rows; words are runs of two or more
    letters or digits, in lower case.
    """
    return scores_of_texts("TF-IDF", "cosine", queries, rows, _cosines)


def _cosines(queries: list[str], documents: list[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer()
    documents_NW = vectorizer.fit_transform(documents)
    queries_QW = vectorizer.transform(queries)
    return (queries_QW @ documents_NW.T).toarray()
