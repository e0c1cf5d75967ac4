"""Scores of candidates are those that all rows would have got; what was left out is said, and the audit's bound holds."""

import numpy as np
import pytest
from distributed import work
from distributed.processes import run
from killing import Killer, killed_and_resumed
from models import llama, randomised, texts, tokenizer

import whence
from whence.data import as_rows
from whence.errors import StaleArtifact, UsageError
from whence.funnel import score_candidates
from whence.indexing.landmarks import Landmarks
from whence.progress import report_to
from whence.tasks import CausalLM

ROWS, QUERIES = as_rows(texts(90, seed=1)), as_rows(texts(6, seed=2)[::2])


@pytest.fixture(scope="module")
def setting():
    """Model, task, operator, an index of all rows and the scores of all."""
    model, task = randomised(llama()).double().eval(), CausalLM(tokenizer())
    curvature = whence.fit(model, task, ROWS, examples="all")
    index = whence.build_index(model, task, ROWS, curvature=curvature, dim=8)
    return model, task, curvature.inverse(), index, whence.score(model, task, QUERIES, ROWS, curvature.inverse())


def places(found, every):
    return [every.example_ids.index(name) for name in found.example_ids]


@pytest.mark.parametrize("candidates", ["bm25:10%", "index:5+tfidf:3", "norm:20+index-lowest:1"])
def test_they_are_the_scores_of_all_rows(setting, candidates):
    model, task, operator, index, every = setting
    found = score_candidates(model, task, QUERIES, ROWS, operator, candidates, index=index)
    np.testing.assert_allclose(found.raw, every.raw[:, places(found, every)], rtol=1e-9, atol=1e-9)
    about = found.about["candidates"]
    assert (found.n_train, about["of"], about["scored"]) == (90, 90, found.shape[1]) and about["left_out"] > 0
    assert about["audit"] is None and set(about["by"]) == {part.partition(":")[0] for part in candidates.split("+")}


def test_an_index_that_loses_nothing_finds_the_best(setting):
    model, task, operator, _, every = setting
    whole = whence.build_index(model, task, ROWS, dim=64, kept="float32")
    found = score_candidates(model, task, QUERIES, ROWS, operator, "index:4+index-lowest:4", index=whole)
    for query in range(3):
        for lowest in (False, True):
            best = [scores.top(query, 4, lowest=lowest)["id"].tolist() for scores in (found, every)]
            assert best[0] == best[1]


def test_a_cap_holds_for_all_queries_together(setting):
    model, task, operator, index, _ = setting
    found = score_candidates(model, task, QUERIES, ROWS, operator, "index:20%", index=index, at_most="10%")
    assert found.shape == (3, 9)


def test_an_audit_adds_rows_and_bounds_the_recall(setting):
    model, task, operator, index, every = setting
    plain = score_candidates(model, task, QUERIES, ROWS, operator, "index:12", index=index)
    best = np.argsort(-every.raw, axis=1, kind="stable")[:, :10]
    truth = [np.isin(row, places(plain, every)).mean() for row in best]
    low = []
    for seed in range(24):
        found = score_candidates(model, task, QUERIES, ROWS, operator, "index:12", index=index, audit="60%", seed=seed)
        about = found.about["candidates"]["audit"]
        assert found.shape[1] == plain.shape[1] + about["rows"]
        np.testing.assert_allclose(found.raw, every.raw[:, places(found, every)], rtol=1e-9, atol=1e-9)
        assert set(about["recall"]) == {"10"} and about["reference"] == operator.label and about["seed"] == seed
        low.append(about["recall"]["10"]["at_least"])
        assert max(low[-1]) <= about["recall"]["10"]["at_best"]
    assert (np.array(low) > truth).mean() <= 0.05 and np.mean(low) > 0.2
    whole = score_candidates(model, task, QUERIES, ROWS, operator, "index:12", index=index, audit="100%")
    assert whole.about["candidates"]["audit"]["recall"]["10"]["at_least"] == pytest.approx(truth)


def test_words_only_need_no_index_and_a_method_can_rank(setting):
    model, task, operator, _, every = setting
    found = score_candidates(model, task, QUERIES, ROWS, operator, "ekfac:5")
    for query in range(3):
        assert found.top(query, 1)["id"].tolist() == every.top(query, 1)["id"].tolist()
    with pytest.raises(UsageError, match="no index to rank by"):
        score_candidates(model, task, QUERIES, ROWS, operator, "index:5")


def test_questions_asked_before_rank_too(setting):
    model, task, operator, _, every = setting
    landmarks = Landmarks(whence.score(model, task, as_rows(texts(40, seed=7)), ROWS, operator))
    found = score_candidates(model, task, QUERIES, ROWS, operator, "landmarks:12+landmarks-lowest:12", landmarks=landmarks)
    assert found.n_train == 90 and found.shape[1] < 60
    ends = [(query, lowest) for query in range(3) for lowest in (False, True)]
    best = [[set(scores.top(query, 5, lowest=lowest)["id"]) for query, lowest in ends] for scores in (found, every)]
    assert sum(len(ours & theirs) for ours, theirs in zip(*best, strict=True)) >= 22, "of 30"
    with pytest.raises(UsageError, match="no landmarks to rank by"):
        score_candidates(model, task, QUERIES, ROWS, operator, "landmarks:5")
    with pytest.raises(StaleArtifact, match="landmarks are of other rows"):
        score_candidates(model, task, QUERIES, ROWS[:50], operator, "landmarks:5", landmarks=landmarks)


def test_what_does_not_fit_is_refused(setting):
    model, task, operator, index, _ = setting
    with pytest.raises(StaleArtifact, match="of other rows"):
        score_candidates(model, task, QUERIES, ROWS[:50], operator, "index:5", index=index)
    with pytest.raises(UsageError, match="at_most can't be '0'"):
        score_candidates(model, task, QUERIES, ROWS, operator, "bm25:5", at_most=0)
    with pytest.raises(UsageError, match="no aggregate"):
        score_candidates(model, task, QUERIES, ROWS, operator, "bm25:5", aggregate="queries")


def test_a_killed_run_resumes_and_other_candidates_are_refused(setting, tmp_path):
    model, task, operator, index, _ = setting

    def found(out, candidates="index:10", **changes):
        given = {"index": index, "audit": "20%", "chunks": 4, "batch_tokens": 40, **changes}
        return score_candidates(model, task, QUERIES, ROWS, operator, candidates, out=out, **given)

    killed_and_resumed(found, tmp_path, "score", 3)
    with report_to(again := Killer()):
        assert found(tmp_path / "whole").about == found(tmp_path / "killed").about and "score" not in again.resumed
    for candidates, changes in (("index:11", {}), ("index:10", {"audit": "21%"}), ("index:10", {"at_most": 5})):
        with pytest.raises(StaleArtifact):
            found(tmp_path / "whole", candidates, **changes)


def test_several_processes_give_the_same(setting):
    model, task, operator, index, _ = setting
    whole = score_candidates(model, task, QUERIES, ROWS, operator, "bm25:10+index:10", index=index, audit="20%")
    for names, raw in run(work.through_a_funnel, ROWS, QUERIES):
        assert names == whole.example_ids
        np.testing.assert_allclose(raw, whole.raw, rtol=1e-6, atol=1e-9)
