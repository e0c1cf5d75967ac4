"""Estimates from scores of other questions are Nystroem's; what can't be landmarks is refused."""

import numpy as np
import pytest
from models import llama, randomised, texts, tokenizer

import whence
from whence.data import as_rows
from whence.errors import StaleArtifact, UsageError
from whence.indexing.landmarks import RIDGE, Landmarks, nystroem, open_landmarks
from whence.tasks import CausalLM

ROWS, QUESTIONS = as_rows(texts(20, seed=1)), as_rows(texts(12, seed=5))


@pytest.fixture(scope="module")
def setting():
    model, task = randomised(llama()).double().eval(), CausalLM(tokenizer())
    return model, task, whence.fit(model, task, ROWS, examples="all").inverse()


def test_a_question_that_is_a_landmark_gets_its_scores(setting):
    model, task, operator = setting
    exact = whence.score(model, task, QUESTIONS, ROWS, operator)
    found = Landmarks(exact).search(model, task, QUESTIONS[:3], operator)
    assert (found.shape, found.n_train, found.example_ids) == ((3, 20), 20, exact.example_ids)
    for estimate, truth in zip(found.raw, exact.raw, strict=False):
        assert np.corrcoef(estimate, truth)[0, 1] > 0.99
    assert found.about["landmarks"] == 12 and list(found.queries["id"]) == list(QUESTIONS[:3].ids)


def test_against_the_formula(setting):
    model, task, operator = setting
    queries = as_rows(texts(6, seed=2)[::2])
    every = whence.score(model, task, queries, [*ROWS, *QUESTIONS], operator).raw
    gram = whence.score(model, task, QUESTIONS, QUESTIONS, operator).raw
    np.testing.assert_allclose(gram, gram.T, rtol=1e-9, atol=1e-9 * np.abs(gram).max())
    rows = whence.score(model, task, QUESTIONS, ROWS, operator)
    ridge = RIDGE * np.trace(gram) / 12 * np.eye(12)
    expected = every[:, 20:] @ np.linalg.inv(gram + ridge) @ rows.raw
    found = Landmarks(rows).search(model, task, queries, operator)
    np.testing.assert_allclose(found.raw, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_what_lies_in_their_span_is_estimated_exactly():
    draw = np.random.default_rng(0)
    q_JP, mix_QJ, g_NP = draw.normal(size=(6, 30)), draw.normal(size=(2, 6)), draw.normal(size=(9, 30))
    k_JJ = q_JP @ q_JP.T
    found = nystroem(mix_QJ @ (k_JJ + RIDGE * np.trace(k_JJ) / 6 * np.eye(6)), k_JJ, q_JP @ g_NP.T)
    np.testing.assert_allclose(found, mix_QJ @ q_JP @ g_NP.T)


def test_what_does_not_fit_is_refused(setting, tmp_path):
    model, task, operator = setting
    whence.score(model, task, QUESTIONS, ROWS, operator, out=tmp_path / "landmarks")
    landmarks = open_landmarks(tmp_path / "landmarks")
    assert landmarks.search(model, task, QUESTIONS[:1], operator).shape == (1, 20)
    other = randomised(llama(), 0.3).double().eval()
    with pytest.raises(StaleArtifact, match="scored with something else"):
        landmarks.search(other, task, QUESTIONS[:1], operator)
    with pytest.raises(StaleArtifact, match="damping"):
        Landmarks(landmarks.scores).search(
            model, task, QUESTIONS[:1], whence.fit(model, task, ROWS, examples="all").inverse(0.3)
        )
    margins = whence.score(model, CausalLM(tokenizer(), measurement="margin"), QUESTIONS, ROWS, operator)
    with pytest.raises(UsageError, match="can't be landmarks"):
        Landmarks(margins)
