"""init, config, recipes and run on the command line; what stages do is tested in tests/pipeline."""

import json
import re

import pytest
import yaml

OTHER = """
models: {base: {name: gpt2}}
dataset: {name: rows.jsonl, format: qa, input_column: Input, output_column: Output}
scores: {query_gradient_rank: 64, train_batch_size: 4}
"""


def test_init_writes_a_file_that_run_reads_and_never_overwrites(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("init", "--model", "gpt2", "--data", "rows.csv", "-c", "prompt=Ask", "-c", "completion=Say").stdout
    assert "whence.yaml: edit it, then whence run whence.yaml" in said
    text = (tmp_path / "whence.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=.whence/schema.json")
    assert json.loads((tmp_path / ".whence" / "schema.json").read_text())["title"] == "whence.yaml"
    values = yaml.safe_load(text)
    assert values["model"] == {"base": "gpt2"} and values["data"]["columns"] == {"prompt": "Ask", "completion": "Say"}
    assert values["train"] == {"epochs": 1.0}
    assert "nothing is overwritten" in run("init", code=2).stderr
    assert (tmp_path / "whence.yaml").read_text() == text
    stages = [line.split()[0] for line in run("run", "--dry-run").stdout.splitlines()]
    assert stages == ["train", "generate", "fit", "inspect", "score", "evaluate", "report"]
    assert not (tmp_path / "runs").exists()


def test_init_looks_for_the_columns_where_the_data_is_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("Ask,Say\nWhere?,In Turin.\n")
    said = run("init", "--data", "rows.csv", "-c", "prompt=Aks", "-c", "completion=Say", code=2).stderr
    assert "rows.csv has no column 'Aks'" in said and "--columns prompt=Ask" in said
    said = run("init", "--data", "rows.csv", code=2).stderr
    assert "No column of rows.csv has a name" in said and not (tmp_path / "whence.yaml").exists()
    run("init", "--data", "rows.csv", "-c", "prompt=Ask", "-c", "completion=Say")
    (tmp_path / "b").mkdir()
    assert "has no column" in run("init", tmp_path / "b" / "w.yaml", "--data", "../rows.csv", "-c", "text=Aks", code=2).stderr


def test_init_converts_another_pipelines_file_and_says_what_is_left(run, tmp_path):
    (tmp_path / "config.yaml").write_text(OTHER)
    said = run("run", tmp_path / "config.yaml", code=2).stderr
    assert "whence init --from" in said
    said = run("init", tmp_path / "whence.yaml", "--from", tmp_path / "config.yaml").stderr
    assert "not converted" in said and "scores.train_batch_size" in said
    assert yaml.safe_load((tmp_path / "whence.yaml").read_text())["score"] == {"rank": 64}


def test_config_says_where_values_come_from(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHENCE_SCORE__RESCORE", "5")
    run("init", "--no-train")
    chosen = ("--set", "score.damping=0.3", "--set", "data.columns={prompt: Ask, completion: Say}")
    lines = run("config", "show", "--origin", *chosen).stdout.splitlines()
    came = {line.split(" = ")[0]: line.rsplit("  ", 1)[-1].strip() for line in lines}
    assert came["score.damping"] == "--set score.damping" and came["score.rescore"] == "WHENCE_SCORE__RESCORE"
    assert came["data.columns"] == "--set data.columns"
    assert came["model.base"] == "whence.yaml" and came["fit.method"] == "default"
    assert json.loads(run("config", "show", "--json").stdout)["score"]["rescore"] == 5
    assert "Damping" in run("config", "schema").stdout or "damping" in run("config", "schema").stdout
    assert "did you mean damping?" in run("config", "show", "--set", "score.dampin=1", code=2).stderr


def test_recipes_are_listed_shown_and_copied(run, tmp_path):
    listed = run("recipes", "ls").stdout
    assert all(name in listed for name in ("openwebtext-llama3-8b", "tinyllama-patents", "tinystories", "demo"))
    assert "meta-llama/Meta-Llama-3-8B" in run("recipes", "cat", "openwebtext-llama3-8b").stdout
    said = run("recipes", "cp", "tinystories", tmp_path / "a").stdout
    assert f"whence run {tmp_path / 'a' / 'whence.yaml'}" in said
    assert "did you mean tinystories?" in run("recipes", "cat", "tinystorys", code=2).stderr


@pytest.mark.slow
def test_run_says_what_it_did_and_where_the_report_is(run, tiny_model_folder, data, tmp_path):
    values = {
        "run": "a",
        "model": {"base": str(tiny_model_folder)},
        "data": {"path": str(data)},
        "prompts": {"items": [{"prompt": "Where was Ada Velt born?", "completion": " In Turin, where else."}]},
        "score": {"queries": "prompts"},
        "evaluate": None,
    }
    (tmp_path / "whence.yaml").write_text(yaml.safe_dump(values))
    done = run("run", tmp_path / "whence.yaml", "-q")
    assert f"report: {tmp_path / 'runs' / 'a' / 'report' / 'report.html'}" in done.stdout
    again = run("run", tmp_path / "whence.yaml")
    assert "1/5 generate  unchanged, skipping" in again.stderr
    told = json.loads(run("run", tmp_path / "whence.yaml", "--json", "--set", "report.top=2", "--dry-run").stdout)
    states = {entry["stage"]: entry["state"] for entry in told["stages"]}
    assert states["report"] == "stale" and states["score"] == "unchanged"
    assert "no stage 'reprot'" in run("run", tmp_path / "whence.yaml", "reprot", code=2).stderr


def test_a_fix_names_the_setting_where_the_command_has_no_such_option(run, tiny_model_folder, data, tmp_path):
    settings = {
        "run": "r",
        "model": {"base": str(tiny_model_folder)},
        "data": {"path": str(data)},
        "prompts": {"items": ["Where was Bo Quist born?"]},
        "train": {"batch_size": 1000, "drop_last": True},
    }
    (tmp_path / "whence.yaml").write_text(json.dumps(settings))
    said = run("run", tmp_path / "whence.yaml", "train", code=2).stderr
    (rows,) = re.findall(r"(\d+) rows to train on", said)
    assert f"(--set train.batch_size={rows})" in said and "--batch-size" not in said
    given = ("--data", data, "--batch-size", "1000", "--drop-last", "--out", tmp_path / "trained")
    said = run("train", tiny_model_folder, *given, code=2).stderr
    (rows,) = re.findall(r"(\d+) rows to train on", said)
    assert f"(--batch-size {rows})" in said and "--set" not in said
