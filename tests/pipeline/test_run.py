"""Whole runs: what each stage leaves, what is skipped, what runs again, and what a kill costs."""

import json
import os
import time

import numpy as np
import pytest
from distributed import work
from distributed.processes import killed, run
from pictures import unseen

from whence.config import read_config
from whence.errors import WhenceError
from whence.pipeline import run_pipeline
from whence.pipeline.lock import Lock
from whence.store.files import locked
from whence.store.scores import open_scores

FILES = {
    "train": ["model/model.safetensors", "training.json", "metrics.jsonl", "training.png"],
    "generate": ["generated.json"],
    "factors": ["manifest.json"],
    "inspect": ["health.md", "health.json"],
    "scores": ["manifest.json"],
    "self": ["manifest.json"],
    "exports": ["scores.npz", "scores.parquet"],
    "evaluate": ["comparison.csv", "comparison_summary.csv", "comparison.png", "influential_examples.md", "combined.md"],
    "report": ["report.html", "report.md", "queries/000.txt"],
}


def go(path, *settings, wanted=()):
    """Run, and say what became of each stage."""
    resolved = read_config(path, settings, environment={})
    return {step.stage.name: step.state for step in run_pipeline(resolved, wanted)}


def out(path):
    return read_config(path, environment={}).out


@pytest.mark.slow
def test_a_run_leaves_all_files_is_then_skipped_and_changes_rerun_what_depends_on_them(settings, notes, frozen):
    path = settings()
    assert set(go(path).values()) == {"new"}
    folder = out(path)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    frozen.text("files.txt", "".join(f"{name}\n" for name in names))
    for place, names in FILES.items():
        for name in names:
            assert (folder / place / name).stat().st_size > 0, f"{place}/{name}"
    first = open_scores(folder / "scores")
    assert first.shape == (3, 18)  # two of the twenty rows are kept out of training
    split = json.loads((folder / "train" / "split.json").read_text())
    assert sorted(first.example_ids) == sorted(split["train"])
    with np.load(folder / "exports" / "scores.npz") as exported:
        assert exported["raw"] == pytest.approx(first.raw)
    pairs = json.loads((folder / "generate" / "generated.json").read_text())["data"]
    assert list(first.queries["completion"]) == [pair["completion"] for pair in pairs]
    assert pairs[0]["reference"].strip().startswith("In ") and "base_completion" in pairs[0]

    started = time.process_time()
    assert set(go(path).values()) == {"unchanged"}
    assert time.process_time() - started < 5
    assert any("1/7 train     unchanged, skipping (lock " in note for note in notes)

    states = unseen(go, path, "score.damping=0.5")
    assert {name for name, state in states.items() if state == "stale"} == {"inspect", "score", "evaluate", "report"}
    assert any("score.damping 0.1 -> 0.5" in note for note in notes)
    assert not np.allclose(open_scores(folder / "scores").raw, first.raw)
    assert np.array_equal(open_scores(folder / "scores.1").raw, first.raw)

    resolved_again = read_config(folder / "whence.yaml", environment={})
    assert resolved_again.out == folder.resolve() and resolved_again.config.score.damping == 0.5
    assert set(go(folder / "whence.yaml").values()) == {"unchanged"}


@pytest.mark.slow
def test_killed_in_every_stage_a_run_ends_with_the_same_scores(settings):
    drawn = {"modules": ["*.1.mlp.up_proj", "*.1.mlp.down_proj"]}
    straight, cut = settings("straight.yaml", inspect=drawn), settings("killed.yaml", inspect=drawn)
    go(straight)
    stages = [("train", 3), ("generate", 2), ("covariance", 2), ("eigenvalues", 2), ("inspect", 1), ("score", 2), ("report", 1)]
    for stage, advances in stages:
        killed(stage, advances, unseen, go, cut)
    states = go(cut)
    assert states["report"] == "resumed" and set(states.values()) == {"unchanged", "resumed"}
    ours, theirs = open_scores(out(cut) / "scores"), open_scores(out(straight) / "scores")
    assert np.array_equal(ours.raw, theirs.raw) and ours.queries.equals(theirs.queries)
    weights = [(out(path) / "train" / "model" / "model.safetensors").read_bytes() for path in (straight, cut)]
    assert weights[0] == weights[1]
    assert not list(out(cut).glob("*.1")) and not list(out(cut).glob(".*.partial"))


def test_a_second_run_on_the_same_folder_says_who_is_there_and_touches_nothing(settings):
    path = settings()
    partial = out(path) / ".report.partial"
    partial.mkdir(parents=True)
    with locked(out(path)), pytest.raises(WhenceError, match=rf"process {os.getpid()}\) is writing to") as raised:
        go(path)
    assert "--set out=" in raised.value.fix
    assert {file.name for file in out(path).iterdir()} == {".lock", partial.name}


@pytest.mark.slow
def test_what_another_run_finished_meanwhile_is_not_done_again(settings, monkeypatch):
    """Between looking and the lock the other run ends: its work is taken."""
    path = settings()
    go(path, wanted=["train", "generate"])
    read = Lock.read
    stale = [Lock(out(path))]
    monkeypatch.setattr(Lock, "read", lambda folder: stale.pop() if stale else read(folder))
    assert go(path, wanted=["generate"]) == {"train": "unchanged", "generate": "unchanged"}


@pytest.mark.slow
def test_without_training_the_prompts_own_completions_are_scored(settings):
    path = settings("asked.yaml", train=None, evaluate=None, score={"queries": "prompts", "per": "module"})
    assert list(go(path)) == ["generate", "fit", "inspect", "score", "report"]
    scores = open_scores(out(path) / "scores")
    assert scores.shape == (3, 20) and scores.modules
    assert [text.strip() for text in scores.queries["completion"]] == ["In Turin.", "In Lyon.", "In Basel."]
    assert scores.n_train == 20
    go(path, "data.limit=6", wanted=["score"])
    some = open_scores(out(path) / "scores")
    assert some.shape == (3, 6) and some.n_train == 20


@pytest.mark.slow
def test_a_method_scores_the_run_and_factors_are_fitted_only_for_those_who_use_them(settings, notes):
    path = settings(score={"method": "tracin", "self_influence": False}, evaluate=None)
    assert list(go(path)) == ["train", "generate", "score", "report"]
    scores = open_scores(out(path) / "scores")
    assert scores.about["method"] == "tracin" and scores.shape == (3, 18) and scores.unit == "nats per step on the row"
    assert any("not checked" in note for note in notes)
    page = (out(path) / "report" / "report.md").read_text()
    assert "nats per step on the row" in page and "Pruthi et al. 2020" in page
    states = go(path, "score.method=ekfac", "score.options.damping=0.4")
    assert list(states) == ["train", "generate", "fit", "inspect", "score", "report"] and states["train"] == "unchanged"
    assert "damping 0.4" in open_scores(out(path) / "scores").about["operator"]


@pytest.mark.slow
def test_a_benchmark_is_kept_when_only_scores_change(settings, tmp_path):
    for part in ("dev", "test"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        question = "Where was Ada Velt born?,Turin,Oslo,Lyon,Ghent,A\n"
        (tmp_path / "mmlu" / part / f"towns_{part}.csv").write_text(5 * question)
    benchmark = {"tasks": ["mmlu_towns"], "data": "mmlu", "fewshot": 0}
    path = settings("asked.yaml", train=None, evaluate={"benchmark": benchmark})
    go(path)
    found = json.loads((out(path) / "evaluate" / "benchmark.json").read_text())
    assert found["results"] and "towns" in (out(path) / "evaluate" / "combined.md").read_text()
    states = go(path, "score.damping=0.5")
    assert states["benchmark"] == "unchanged" and states["evaluate"] == "stale"


def stages_of(ends):
    """What the first of two processes says of the stages; the other says nothing."""
    (code, said, complaints), other = ends
    assert (code, other) == (0, (0, "", "")), complaints
    return json.loads(said)["stages"]


@pytest.mark.slow
def test_two_processes_make_one_run(settings):
    path = settings()
    first = stages_of(run(unseen, work.command, "run", path, "--json"))
    assert {stage["state"] for stage in first} == {"new"}
    assert open_scores(out(path) / "scores").shape == (3, 18)
    assert set(go(path).values()) == {"unchanged"}, "what one process would have made"
    changed = stages_of(run(unseen, work.command, "run", path, "--json", "--set", "score.damping=0.5"))
    assert {stage["stage"] for stage in changed if stage["state"] == "stale"} == {"inspect", "score", "evaluate", "report"}
