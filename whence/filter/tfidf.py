"""TF-IDF: how similar two texts are in their words, the baseline that any attribution has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tfidf_scores(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """Cosines `[Q, N]` in [0, 1] between the TF-IDF vectors of queries and documents (Salton and Buckley, 1988).

    Term frequencies enter as they are, inverse document frequencies come from the documents; words are runs of two or more
    letters or digits, in lower case.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer()
    documents_NW = vectorizer.fit_transform(documents)
    queries_QW = vectorizer.transform(queries)
    return (queries_QW @ documents_NW.T).toarray()
