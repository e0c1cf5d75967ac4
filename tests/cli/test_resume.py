"""`kill -9` at any stage, then the same command again: the same bits as if nothing had happened."""

import shutil

import numpy as np
import pytest
from distributed import work
from distributed.processes import killed
from facts import facts, write_jsonl

from whence.progress import Silent, report_to
from whence.store.scores import Scores, open_scores


class Resumed(Silent):
    """Remembers how much of each stage an earlier run had done."""

    def __init__(self):
        self.stages: dict[str, int] = {}

    def begin(self, stage):
        self.stages[stage.name] = stage.resumed


def fit_command(model, data, factors):
    return [
        "fit",
        model,
        "--data",
        data,
        "--out",
        factors,
        "--batch-tokens",
        "60",
        "--chunks",
        "4",
        "--disjoint",
        "--save-every",
        "0",
        "-q",
    ]


def score_command(model, data, queries, factors, scores):
    given = ["score", model, "--data", data, "--factors", factors, "--queries", queries, "--out", scores]
    return [*given, "--rank", "2", "--rescore", "3", "--norm", "relatif", "--batch-tokens", "60", "--chunks", "4", "-q"]


@pytest.fixture
def uninterrupted(run, tiny_model_folder, data, queries, tmp_path, tmp_path_factory):
    """Factors and scores of commands that nothing happened to: copies, since they are the same in every test."""
    once = tmp_path_factory.getbasetemp() / "uninterrupted"
    if not once.exists():
        run(*fit_command(tiny_model_folder, data, once / "factors"))
        run(*score_command(tiny_model_folder, data, queries, once / "factors", once / "scores"))
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return open_scores(tmp_path / "scores")


@pytest.fixture
def data(tmp_path):
    """More rows than batches."""
    rows = [{**row, "prompt": f"{row['prompt']} {number}"} for number in range(2) for row in facts()]
    return write_jsonl(tmp_path / "train.jsonl", rows)


def same(a: Scores, b: Scores) -> bool:
    """Whether everything is the same, bit for bit."""
    assert a.exact is not None and b.exact is not None
    return (
        np.array_equal(a.raw, b.raw)
        and np.array_equal(a.exact, b.exact)
        and all(np.array_equal(a.norms[name], b.norms[name]) for name in a.norms)
        and a.examples.equals(b.examples)
        and a.queries.equals(b.queries)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "advances"), [("covariance", 4), ("eigenvectors", 3), ("eigenvalues", 4)])
def test_a_killed_fit(run, tiny_model_folder, data, queries, tmp_path, uninterrupted, stage, advances):
    command = fit_command(tiny_model_folder, data, tmp_path / "again")
    killed(stage, advances, work.command, *command)
    assert not (tmp_path / "again" / "manifest.json").exists()
    seen = Resumed()
    with report_to(seen):
        run(*command)
    first = "covariance" if stage == "eigenvectors" else stage
    assert seen.stages[first] > 0, "the second run began from nothing"
    run(*score_command(tiny_model_folder, data, queries, tmp_path / "again", tmp_path / "scores-again"))
    assert same(open_scores(tmp_path / "scores-again"), uninterrupted)
    for shard in (tmp_path / "factors").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "advances"), [("queries", 1), ("score", 5), ("rescore", 2)])
def test_a_killed_score(run, tiny_model_folder, data, queries, tmp_path, uninterrupted, stage, advances):
    command = score_command(tiny_model_folder, data, queries, tmp_path / "factors", tmp_path / "again")
    killed(stage, advances, work.command, *command)
    assert not (tmp_path / "again" / "manifest.json").exists()
    seen = Resumed()
    with report_to(seen):
        run(*command)
    assert (seen.stages["score"] > 0) == (stage != "queries")
    assert same(open_scores(tmp_path / "again"), uninterrupted)


def test_a_finished_folder_that_lost_a_file(run, tiny_model_folder, data, queries, tmp_path, uninterrupted):
    shutil.copytree(tmp_path / "factors", tmp_path / "broken")
    (tmp_path / "broken" / "eigenvalues-00.safetensors").unlink()
    command = score_command(tiny_model_folder, data, queries, tmp_path / "broken", tmp_path / "never")
    said = run(*command, code=4).stderr
    assert "broken/eigenvalues-00.safetensors is damaged" in said and "it is missing" in said
