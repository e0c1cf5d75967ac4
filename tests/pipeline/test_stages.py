"""Runs of two trainings: what each leaves, what runs again, what a kill costs, and the same scores from a file of stages."""

import json

import numpy as np
import pytest
import yaml
from distributed import work
from distributed.processes import killed, run
from pictures import unseen

from whence import open_stages
from whence.config import read_config
from whence.pipeline import plan_run, run_pipeline

TRAINING = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 2, "log_steps": 1, "evaluation": 0.0}
STAGES = ["pretraining/train", "pretraining/fit", "train", "generate", "fit", "inspect", "score", "report"]
SCORE = {"self_influence": False, "export": ["csv"], "check": False}


@pytest.fixture
def two(settings, tmp_path):
    """Write a run of two trainings, of texts and then of questions: gives the path of its whence.yaml."""
    texts = [
        {"text": f"{person} was born in {town}."} for person in ("Ada", "Bo", "Cleo") for town in ("Turin", "Oslo", "Lyon")
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pretraining = {"name": "pretraining", "data": {"path": "texts.jsonl", "max_length": 32}, "train": TRAINING}

    def write(name="whence.yaml", **changes):
        stages = [pretraining, {"name": "finetuning"}]
        return settings(name, stages=stages, train=TRAINING, evaluate=None, score=SCORE, **changes)

    return write


def go(path, *settings, wanted=()):
    resolved = read_config(path, settings, environment={})
    return {step.stage.name: step.state for step in run_pipeline(resolved, wanted)}


def planned(path, *settings):
    return {step.stage.name: step.state for step in plan_run(read_config(path, settings, environment={}))}


def scores(path):
    return {name: each.raw for name, each in open_stages(read_config(path, environment={}).out / "scores").stages.items()}


def test_what_runs_again_when_a_setting_of_one_training_changes(two):
    path = two()
    assert planned(path) == dict.fromkeys(STAGES, "new")
    assert list(go(path, wanted=("pretraining/fit",))) == ["pretraining/train", "pretraining/fit"]
    stale = planned(path, "stages.pretraining.train.max_steps=3")
    assert {stale[name] for name in STAGES[:2]} == {"stale"}
    assert planned(path, "train.max_steps=3", "stages.finetuning.transport=identity")["pretraining/train"] == "unchanged"


@pytest.mark.slow
def test_two_files_become_a_report_of_both_trainings_and_a_file_of_stages_gives_the_same_scores(two):
    path = two()
    assert go(path) == dict.fromkeys(STAGES, "new")
    assert set(go(path).values()) == {"unchanged"}
    folder = read_config(path, environment={}).out
    staged = open_stages(folder / "scores")
    assert {name: each.shape for name, each in staged.stages.items()} == {"pretraining": (3, 9), "finetuning": (3, 20)}
    assert set(staged.table["status"]) == {"shared"} and "flow" in staged.about["finetuning"]["transport"]
    page = (folder / "report" / "report.html").read_text()
    for said in ("Through which stage of training", "Rows of pretraining that raise it most", "Stages of training"):
        assert said in page
    for said in ("rows of pretraining <b>9", "The strongest row of finetuning", "dividing by N = 9<", "dividing by N = 20<"):
        assert said in page, "a stage is not taken for all"
    text = (folder / "report" / "report.md").read_text()
    assert "| pretraining | " in text and "## Stages of training" in text and "9 rows of pretraining (N = 9) were" in text

    code, said, _ = work.command("show", folder, "--json", "--top", 2)
    shown = json.loads(said)
    assert code == 0 and [entry["stage"] for entry in shown["shares"]] == ["pretraining", "finetuning"]
    assert sum(entry["share"] for entry in shown["shares"]) == pytest.approx(1)
    top = shown["stages"]["pretraining"]["queries"][0]["rows"]
    assert len(top) == 2 and top[0]["value"] == pytest.approx(staged.stages["pretraining"].values[0].max())
    said = work.command("show", folder, "--top", 2)[1]
    assert "pretraining" in said and "share: of all that rows push and pull" in said and "shared (" in said

    same = {
        "pretraining": {"model": folder / "stages/pretraining/train/model", "data": {"path": "texts.jsonl"}},
        "finetuning": {
            "model": folder / "train/model",
            "data": {"path": "rows.jsonl", "columns": {"prompt": "Ask", "completion": "Say"}},
        },
    }
    factors = {"pretraining": folder / "stages/pretraining/factors", "finetuning": folder / "factors"}
    entries = [
        {"name": name, **entry, "model": str(entry["model"]), "factors": str(factors[name])} for name, entry in same.items()
    ]
    (path.parent / "stages.yaml").write_text(yaml.safe_dump({"stages": entries}))
    generated = json.loads((folder / "generate" / "generated.json").read_text())["data"]
    pairs = [{key: pair[key] for key in ("prompt", "completion")} for pair in generated]
    (path.parent / "asked.json").write_text(json.dumps(pairs))
    options = ["--queries", path.parent / "asked.json", "--products", "float32", "--chunks", 4, "--batch-tokens", 64]
    words = ["score", "--through", path.parent / "stages.yaml", *options, "-o", path.parent / "through"]
    code, said, error = work.command(*words)
    assert code == 0, error
    again = open_stages(path.parent / "through")
    for name, each in staged.stages.items():
        assert again.stages[name].raw == pytest.approx(each.raw, rel=1e-4, abs=1e-6 * float(np.abs(each.raw).max()))
    code, _, error = work.command(*words, "--factors", "x")
    assert code == 2 and "--factors is for one training" in error


@pytest.mark.slow
def test_a_kill_in_any_stage_costs_nothing(two):
    """In the first training, in its factors once it is over, and in the scores that need everything before."""
    straight, cut = two(), two("cut.yaml")
    go(straight, wanted=("score",))
    for stage, advances in (("train", 3), ("covariance", 2), ("score", 2)):
        killed(stage, advances, go, cut)
    go(cut, wanted=("score",))
    for name, raw in scores(straight).items():
        assert np.array_equal(scores(cut)[name], raw)


@pytest.mark.slow
def test_two_processes_give_the_same_scores(two):
    one, together = two(), two("together.yaml")
    go(one, wanted=("score",))
    for code, _, error in run(unseen, work.command, "run", together, "score", "--quiet"):
        assert code == 0, error
    for name, raw in scores(one).items():
        assert scores(together)[name] == pytest.approx(raw, rel=1e-3, abs=1e-4 * float(np.abs(raw).max()))
