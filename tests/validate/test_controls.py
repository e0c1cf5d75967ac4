import numpy as np
import pandas
import pytest

from whence.filter.bm25 import bm25_scores
from whence.store.scores import Scores
from whence.validate.controls import NORM, SWAPPED, UNRELATED, best_rank, controls

QUERIES = 6
ROWS = [f"row number{n} speaks of topic{n % QUERIES} and thing{n % 7}" for n in range(60)]
ASKED = [f"what is topic{n} of thing{n}" for n in range(QUERIES)]
SOURCES = [[n + 6 * 3, n + 6 * 7] for n in range(QUERIES)]  # of the topic, but two of its ten rows


def known_sources(sources):
    """The reciprocal rank of each query's best source."""
    return lambda matrix: np.array([1 / best_rank(row, where) for row, where in zip(matrix, sources, strict=True)])


def made(raw, norms=None):
    examples = pandas.DataFrame({"id": [f"r{n}" for n in range(len(ROWS))], "text": ROWS, "tokens": 7})
    queries = pandas.DataFrame({"id": [f"q{n}" for n in range(QUERIES)], "text": ASKED})
    return Scores(np.asarray(raw, dtype=float), len(ROWS), examples, queries, {"unit": "nats per copy"}, norms or {})


def good(seed=0):
    """Scores that know the sources."""
    raw = np.random.default_rng(seed).standard_normal((QUERIES, len(ROWS)))
    for row, where in zip(raw, SOURCES, strict=True):
        row[where] = [5, 4]
    return raw


def flags(raw, **settings):
    return controls(made(raw), truth=known_sources(SOURCES), truth_name="reciprocal rank", **settings).flags


def test_scores_that_know_the_sources_beat_every_control():
    found = controls(made(good()), truth=known_sources(SOURCES), truth_name="reciprocal rank")
    assert found.flags == []
    assert {row["control"] for row in found.tables[""]} == {"BM25", "TF-IDF", "random", UNRELATED}
    assert found.about["quality"]["mean"] == 1 and all(row["beaten"] for row in found.tables[""])


@pytest.mark.parametrize("spoil", [lambda raw: -raw, lambda raw: np.random.default_rng(1).permuted(raw, axis=1)])
def test_shuffled_or_negated_scores_are_flagged(spoil):
    found = flags(spoil(good()))
    assert any(flag.startswith("not better than BM25: reciprocal rank") for flag in found)
    assert any(flag.startswith("not better than random") for flag in found)


def test_a_word_search_is_recognised():
    found = controls(made(bm25_scores(ASKED, ROWS).raw))
    bm25 = found.row(control="BM25")
    assert bm25["correlation"] == pytest.approx(1) and bm25["overlap"] == 1
    assert any(flag.startswith("BM25 alone gives nearly this ranking") for flag in found.flags)
    assert not any("random" in flag for flag in found.flags)


def test_sizes_that_are_those_of_the_gradients_are_flagged():
    draw = np.random.default_rng(0)
    norms = draw.exponential(size=len(ROWS))
    raw = draw.choice([-1, 1], (QUERIES, len(ROWS))) * norms * draw.uniform(0.95, 1.05, (QUERIES, len(ROWS)))
    found = controls(made(raw, {"gradient": norms}))
    norm = found.tables[""][0]
    assert norm["control"] == NORM and norm["sizes"] > 0.95 and abs(norm["correlation"]) < 0.5
    assert any("gradients" in flag and "cosine" in flag for flag in found.flags)
    assert controls(made(good(), {"gradient": norms})).flags == []


def test_a_ranking_that_follows_the_form_of_the_question_is_flagged():
    draw = np.random.default_rng(0)
    form, other = draw.standard_normal(len(ROWS)), draw.standard_normal((QUERIES, len(ROWS)))
    raw = form + 0.1 * draw.standard_normal((QUERIES, len(ROWS)))
    found = controls(made(raw), {UNRELATED: raw[::-1], SWAPPED: other})
    assert any("form of the question" in flag for flag in found.flags)
    assert not any(
        "form of the question" in flag
        for flag in controls(made(other), {UNRELATED: other[::-1], SWAPPED: other + 0.1 * raw}).flags
    )


def test_one_query_has_no_interval_and_gets_no_verdict():
    scores = made(good())
    one = Scores(scores.raw[:1], scores.n_train, scores.examples, scores.queries.iloc[:1])
    found = controls(one, truth=known_sources(SOURCES[:1]))
    assert [row.get("beaten") for row in found.tables[""]] == [None, None, None]
    assert "not better" not in " ".join(found.flags)


def test_ties_count_against_a_ranking():
    assert best_rank(np.zeros(10), [3, 4]) == 9
    assert best_rank(np.array([1.0, 0, 0]), [0]) == 1
    assert known_sources([[3, 4]])(np.zeros((1, 10))).tolist() == [1 / 9]
