import numpy as np
import pytest

from whence.filter.tfidf import tfidf_scores

DOCUMENTS = ["the cat sat", "the dog sat", "the cat sat on the mat", "a bird"]


def test_cosines_of_every_query_with_every_document():
    scores = tfidf_scores(["the cat", "A BIRD!"], DOCUMENTS).raw
    assert scores.shape == (2, 4)
    assert scores.argmax(1).tolist() == [0, 3]
    assert scores.min() == 0 and scores[1].tolist() == pytest.approx([0, 0, 0, 1])


def test_against_the_formula():
    documents = ["aa bb bb", "bb cc", "dd"]
    words = ["aa", "bb", "cc", "dd"]
    counts = np.array([[text.split().count(word) for word in words] for text in ["aa bb", *documents]], float)
    idf = np.log((1 + 3) / (1 + (counts[1:] > 0).sum(0))) + 1
    vectors = counts * idf
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(tfidf_scores(["aa bb"], documents).raw, vectors[:1] @ vectors[1:].T)


def test_words_that_no_document_has_score_nothing():
    assert not tfidf_scores(["zebra"], DOCUMENTS).raw.any()
