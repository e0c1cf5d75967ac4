"""whence score --candidates, as a user strings it together."""

import json

import numpy as np

from whence.store.scores import open_scores


def test_candidates_are_scored_and_audited(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = (tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries)
    run("score", *given, "-o", tmp_path / "all", "-q")
    every = open_scores(tmp_path / "all")
    run("index", "build", tiny_model_folder, "-d", data, "-f", fitted, "-o", tmp_path / "index", "-q")
    ranked = ("--candidates", "index:1+landmarks:1+bm25:1", "--index", tmp_path / "index", "--landmarks", tmp_path / "all")
    said = run("score", *given, *ranked, "--candidates-at-most", "3", "-o", tmp_path / "few").stdout
    assert "3 of 12 rows were candidates (index:1+landmarks:1+bm25:1); the other 9 were not scored" in said
    assert "is not known" in said
    few = open_scores(tmp_path / "few")
    places = [every.example_ids.index(name) for name in few.example_ids]
    np.testing.assert_allclose(few.raw, every.raw[:, places], rtol=1e-3, atol=1e-4 * np.abs(every.raw).max())
    assert few.n_train == 12 and "3 of 12 rows were candidates" in run("show", tmp_path / "few").stdout

    audited = json.loads(run("score", *given, *ranked, "--audit", "100%", "-o", tmp_path / "audited", "--json").stdout)
    audit = audited["candidates"]["audit"]
    assert audited["rows"] == 12 and audit["rows"] == audited["candidates"]["left_out"]
    held = [np.isin(every.top(query, 10)["id"], few.example_ids).mean() for query in range(4)]
    assert all(np.array(audit["recall"]["10"]["at_least"]) >= np.array(held) - 1e-9), "more candidates, and all were looked at"
    assert "candidates hold at least" in run("show", tmp_path / "audited").stdout


def test_what_is_pointless_is_refused(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = ("score", tiny_model_folder, "-d", data, "--queries", queries, "-o", tmp_path / "x")
    assert "--audit is for candidates" in run(*given, "-f", fitted, "--audit", "5%", code=2).stderr
    assert "--method is not" in run(*given, "--method", "bm25", "--candidates", "bm25:2", code=2).stderr
    assert "no index to rank by" in run(*given, "-f", fitted, "--candidates", "index:2", code=2).stderr
    wrong = run(*given, "-f", fitted, "--candidates", "bm52:2%", code=2).stderr
    assert "'bm52:2%'" in wrong and "tfidf" in wrong and "bm25:2%" in wrong
