import numpy as np
import pytest

from whence.filter.bm25 import bm25_scores

DOCUMENTS = ["the cat sat", "the dog sat", "the cat sat on the mat", "a bird", ""]


def test_the_documents_that_have_the_words_come_first():
    scores = bm25_scores(["cat", "A BIRD!"], DOCUMENTS).raw
    assert scores.shape == (2, 5)
    assert scores.argmax(1).tolist() == [0, 3]  # the shorter one of those with a cat
    assert (scores[0] > 0).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0)])
def test_against_the_formula(k1, b):
    rows, query = ["aa bb bb", "bb cc", "dd dd dd dd", "aa"], "aa bb bb zz"
    words = [row.split() for row in rows]
    mean = np.mean([len(row) for row in words])
    expected = [
        sum(
            np.log(1 + (len(rows) - n + 0.5) / (n + 0.5))
            * (tf / (tf + k1 * (1 - b + b * len(row) / mean)) if (tf := row.count(word)) else 0)
            for word in query.split()
            if (n := sum(word in other for other in words)) or True
        )
        for row in words
    ]
    np.testing.assert_allclose(bm25_scores([query], rows, k1, b).raw[0], expected)


def test_words_that_no_document_has_score_nothing():
    assert not bm25_scores(["zebra", ""], DOCUMENTS).raw.any()
    assert bm25_scores(["cat"], ["", "?"]).raw.tolist() == [[0, 0]]
