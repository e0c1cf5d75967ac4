"""The commands as a user strings them together, on a tiny model."""

import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from facts import facts, write_jsonl

from whence.cli import COMMANDS
from whence.data import load_data
from whence.progress import Silent, report_to
from whence.serve.decisions import Decisions
from whence.show.numbers import three_digits
from whence.store.scores import open_scores
from whence.tasks import CausalLM
from whence.train.small import Training, train


class Interrupter(Silent):
    """Presses Ctrl-C when the stage of the given name has advanced so often."""

    def __init__(self, name: str, after: int):
        self.name, self.left = name, after

    def advance(self, stage):
        self.left -= stage.name == self.name
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def scored(run, tiny_model_folder, data, queries, fitted, tmp_path):
    options = ("--per", "token", "--norm", "cosine", "--norm", "relatif")
    run("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-o", tmp_path / "scores", "-q", *options)
    return tmp_path / "scores"


def test_from_fit_to_export(run, tiny_model_folder, data, queries, tmp_path):
    factors, scores = tmp_path / "run" / "factors", tmp_path / "run" / "scores"
    made = json.loads(run("fit", tiny_model_folder, "--data", data, "--out", factors, "--json").stdout)
    assert (
        made["factors"] == str(factors) and made["method"] == "ekfac" and made["examples"] == 12 and len(made["modules"]) == 6
    )

    given = (tiny_model_folder, "--data", data, "--factors", factors, "--queries", queries, "--out", scores)
    result = json.loads(run("score", *given, "--per", "token", "--json").stdout)
    assert result["unit"] == "nats per copy" and result["n_train"] == 12 and "raises" in result["sign"]

    shown = json.loads(
        run("show", tmp_path / "run", "--query", "1", "--top", "3", "--lowest", "--by", "source", "--json").stdout
    )
    (query,) = shown["queries"]
    assert shown["unit"] == "nats per copy" and shown["trust"] is None and query["completion"] == " In Ghent, where else."
    assert [row["rank"] for row in query["rows"]] == [1, 2, 3, -3, -2, -1]
    expected = open_scores(scores).top(1, 3)
    assert all(sum(row["token_values"]) == pytest.approx(row["value"], rel=1e-4) for row in query["rows"])
    assert [row["value"] for row in query["rows"][:3]] == pytest.approx(list(expected["value"]))
    assert sum(query["by_source"].values()) == pytest.approx(open_scores(scores).values[1].sum())

    health = json.loads(run("inspect", factors, "--json").stdout)
    assert all(entry["sound"] and 0 < entry["effective_rank"] <= 16 * 24 for entry in health["modules"])

    exported = json.loads(run("export", scores, "--out", tmp_path / "x.parquet", "--json").stdout)
    assert exported["unit"] == "nats per copy" and len(pd.read_parquet(tmp_path / "x.parquet")) == 4 * 12


def test_rows_are_exported_by_what_was_decided(run, tiny_model_folder, data, tmp_path):
    home = tmp_path / "run"
    run("fit", tiny_model_folder, "--data", data, "--out", home / "factors", "--quiet")
    export = ("export", home, "--out")
    assert "Nothing was decided" in run(*export, tmp_path / "kept.jsonl", "--rows", "kept", code=2).stderr
    rows = load_data(data)
    decisions = Decisions(home / "decisions.jsonl")
    for name, verdict in zip(rows.ids, ("drop", "keep", "fix", "drop", "drop"), strict=False):
        decisions.decide(name, verdict)
    decisions.undo()
    assert "10 of 12 rows stay" in run(*export, tmp_path / "kept.jsonl", "--rows", "kept").stdout
    found = json.loads(run(*export, tmp_path / "gone.jsonl", "--rows", "dropped", "--json").stdout)
    assert found["rows"] == 2 and found["of"] == 12
    run(*export, tmp_path / "gone.txt", "--rows", "dropped")
    assert (tmp_path / "gone.txt").read_text().split() == [rows.ids[0], rows.ids[3]]
    kept, gone = (load_data(tmp_path / f"{name}.jsonl", columns={"id": "id"}) for name in ("kept", "gone"))
    assert list(kept.ids) == [name for name in rows.ids if name not in (rows.ids[0], rows.ids[3])]
    assert {name: row for each in (kept, gone) for name, row in zip(each.ids, each, strict=True)} == dict(
        zip(rows.ids, rows, strict=True)
    )
    for options, said in (
        (("kept.jsonl", "--rows", "kept"), "exists"),
        (("kept.csv", "--rows", "kept"), ".jsonl, or .txt"),
        (("x.jsonl", "--rows", "kept", "--norm", "cosine"), "one of them"),
    ):
        assert said in run(*export, tmp_path / options[0], *options[1:], code=2).stderr


def test_show_says_sign_and_unit_in_words(run, scored):
    lines = run("show", scored, "--top", "2", "--lowest").stdout.splitlines()
    assert lines[1] == '"Where was Ada Velt born?" -> "In Turin, where else."'
    assert lines[2].startswith("log p -") and "nats over" in lines[2]
    assert "the slope of log p(answer) at these weights, in nats per copy of the row, N = 12 rows" in lines[3]
    ranks = [line.split()[:4] for line in lines[5:9]]
    assert [rank[0] for rank in ranks] == ["1", "2", "-2", "-1"]
    for _, effect, value, unit in ranks:
        assert unit == "nats" and value[0] == ("+" if effect == "raises" else "-")
    assert lines[-1].startswith("trust: not measured")


def test_strong_tokens_are_between_brackets(run, scored):
    shown = run("show", scored, "--top", "1", "--tokens").stdout
    assert shown.count("⟦") == shown.count("⟧") > 0
    assert "text (strongest part)" in shown


def test_colours_on_a_terminal(scored, monkeypatch):
    from rich.console import Console

    from whence.cli import console, show
    from whence.cli.ranking import Ranking

    style = {"force_terminal": True, "highlight": False, "color_system": "truecolor"}
    terminal = Console(file=io.StringIO(), width=150, record=True, **style)
    monkeypatch.setattr(console, "out", terminal)
    assert console.coloured()
    show.display(Ranking(open_scores(scored), None, 1, 0, coloured=True), [0], tokens=True)
    shown = terminal.export_text(styles=True)
    assert "38;5;33mraises" in shown and "1;4;38;5;33m" in shown and "⟦" not in shown


def test_show_normalised_and_all(run, scored):
    found = json.loads(run("show", scored, "--all", "--norm", "cosine", "--top", "2", "--json").stdout)
    assert found["unit"] == "cosine" and len(found["queries"]) == 4
    assert all(abs(row["value"]) <= 1 for query in found["queries"] for row in query["rows"])
    assert "as relative influence" in run("show", scored, "--norm", "relatif").stdout
    (query,) = json.loads(run("show", scored, "--norm", "length", "--json").stdout)["queries"]
    plain = open_scores(scored)
    for row in query["rows"]:
        assert row["value"] == pytest.approx(plain.values[0, plain.example_ids.index(row["id"])] / row["tokens"])


def test_show_ranks_the_rows_that_match(run, scored):
    every = json.loads(run("show", scored, "--query", "1", "--top", "12", "--json").stdout)["queries"][0]["rows"]
    given = ("show", scored, "--query", "1", "--where", "text~cleo", "--where", "tokens>=1")
    (query,) = json.loads(run(*given, "--top", "12", "--json").stdout)["queries"]
    left = [row for row in every if "Cleo" in row["text"]]
    assert [row["id"] for row in query["rows"]] == [row["id"] for row in left] and 1 < len(left) < 12
    assert sum(row["share"] for row in query["rows"]) == pytest.approx(1)
    assert f"{len(left)} rows scored" in run(*given).stdout
    assert "No row meets text~nobody" in run("show", scored, "--where", "text~nobody", code=2).stderr


def test_show_names_the_queries_there_are(run, scored):
    assert "0 to 3" in run("show", scored, "--query", "9", code=2).stderr
    name = open_scores(scored).query_ids[2]
    assert json.loads(run("show", scored, "--query", name, "--json").stdout)["queries"][0]["query"] == 2


@pytest.mark.parametrize("ending", ["csv", "jsonl", "npz", "parquet"])
def test_exports_say_their_unit_and_overwrite_nothing(run, scored, tmp_path, ending):
    file = tmp_path / f"x.{ending}"
    run("export", scored, "--out", file)
    if ending == "npz":
        with np.load(file) as content:
            assert content["unit"] == "nats per copy" and content["scores"].shape == (4, 12)
    elif ending == "parquet":
        import pyarrow.parquet

        assert b"nats per copy" in pyarrow.parquet.read_schema(file).metadata[b"whence"]
    else:
        table = pd.read_csv(file) if ending == "csv" else pd.read_json(file, lines=True)
        assert set(table["unit"]) == {"nats per copy"} and set(table["n_train"]) == {12}
    assert "exists" in run("export", scored, "--out", file, code=2).stderr


def test_self_influence(run, tiny_model_folder, data, fitted, tmp_path):
    run("score", tiny_model_folder, "-d", data, "-f", fitted, "--self", "-o", tmp_path / "self", "-q")
    shown = run("show", tmp_path / "self", "--top", "3").stdout
    assert shown.startswith("Influence of each row on itself") and "log p of the row itself" in shown
    assert "nothing" in run("score", tiny_model_folder, "-d", data, "-f", fitted, "--self", "-o", tmp_path / "self").stderr


def test_scores_per_module_aggregated_rescored(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-q")
    run(*given, "-o", tmp_path / "modules", "--per", "module")
    scores = open_scores(tmp_path / "modules")
    np.testing.assert_allclose(sum(scores.modules.values()), scores.raw, rtol=1e-4, atol=1e-6)
    run(*given, "-o", tmp_path / "together", "--aggregate", "queries,examples")
    assert open_scores(tmp_path / "together").shape == (1, 1)
    assert "all" in run("show", tmp_path / "together").stdout
    run(*given, "-o", tmp_path / "rescored", "--rank", "2", "--rescore", "3")
    assert open_scores(tmp_path / "rescored").exact.sum() == 4 * 6
    assert "at rank 2" in run("show", tmp_path / "rescored").stdout


def test_loss_and_margin_have_their_own_words(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-q")
    run(*given, "-o", tmp_path / "loss", "--measurement", "loss")
    assert "the slope of the loss of the answer" in run("show", tmp_path / "loss").stdout
    run(*given, "-o", tmp_path / "margin", "--measurement", "margin")
    assert "margin per copy" in run("show", tmp_path / "margin").stdout


def test_trace_answers_reuses_and_keeps(run, tiny_model_folder, data, tmp_path):
    given = (
        "trace",
        tiny_model_folder,
        "--data",
        data,
        "-q",
        "Where was Ada Velt born?",
        "--out",
        tmp_path / "run",
        "--max-new-tokens",
        "4",
    )
    first = run(*given)
    assert "covariance" in first.stderr and "generated greedily" in first.stdout and "by source" in first.stdout
    again = run(*given)
    assert again.stdout == first.stdout and "covariance" not in again.stderr
    asked = run(*given, "-a", " In Oslo.", "--contrast", " In Turin.", "--json")
    assert "covariance" not in asked.stderr
    (query,) = json.loads(asked.stdout)["queries"]
    assert query["contrast"] == " In Turin." and "minus the same of the contrast" in query["sign"]
    shown = run("show", tmp_path / "run")
    assert "rather than" in shown.stdout and "the newest" in shown.stderr
    spans = [("--span", "Oslo"), ("--span-at", "4,8"), ("--span-at", "12,16")]
    named, first, second = (
        json.loads(run(*given, "-a", " In Oslo or Oslo.", *span, "--json").stdout)["queries"][0] for span in spans
    )
    assert named["rows"] == first["rows"] != second["rows"]
    for span, said in (
        (("--span-at", "4,8", "--span", "Oslo"), "--span Oslo and --span-at 4,8"),
        (("--span-at", "4"), "--span-at can't be 4."),
        (("--span-at", "9,99"), "characters 9 to 99, of 17"),
    ):
        assert said in run(*given, "-a", " In Oslo or Oslo.", *span, code=2).stderr


def test_n_is_the_rows_trained_on_whichever_are_scored(run, tiny_model_folder, data, tmp_path):
    asked = ("-d", data, "-q", "Where was Ada Velt born?", "-a", " In Oslo.", "--json")
    some = run("trace", tiny_model_folder, *asked, "--limit", "6", "-o", tmp_path / "some")
    assert json.loads(some.stdout)["n_train"] == 12 and f"N = 12, the rows of {data}, of which the first 6" in some.stderr
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "training.json").write_text(json.dumps({"rows": {"train": 40}}))
    trained = tiny_model_folder.rename(tmp_path / "train" / "model")
    for number, options in enumerate([(), ("--limit", "6")]):
        known = run("trace", trained, *asked, *options, "-o", tmp_path / f"known-{number}")
        assert json.loads(known.stdout)["n_train"] == 40 and "N = 40, the rows that the model was trained on" in known.stderr


def test_what_is_more_than_log_p_can_rise_is_marked(run, tiny_model_folder, tiny_llama, tiny_tokenizer, data, tmp_path):
    train(tiny_llama, CausalLM(tiny_tokenizer), facts(), Training(epochs=60, batch_size=4, learning_rate=0.03))
    tiny_llama.save_pretrained(tmp_path / "sure")
    tiny_tokenizer.save_pretrained(tmp_path / "sure")
    row = facts()[0]
    given = ("trace", tmp_path / "sure", "-d", data, "-q", row["prompt"], "-a", row["completion"], "-o", tmp_path / "run")
    (query,) = json.loads(run(*given, "--json").stdout)["queries"]
    first = query["rows"][0]
    assert query["room"] == -query["log_p"] > 0 and first["beyond_first_order"] and first["value"] > query["room"]
    shown = run("show", tmp_path / "run").stdout
    assert f"nats (at most {three_digits(query['room'])})" in shown and "(p = " in shown
    assert "a larger effect is beyond first order" in shown and "--measurement margin" in shown
    (summed,) = json.loads(run("show", tmp_path / "run", "--by", "source", "--json").stdout)["queries"]
    impossible = [name for name, value in summed["by_source"].items() if value > query["room"]]
    printed = run("show", tmp_path / "run", "--by", "source").stdout
    assert impossible and printed.count("nats (beyond first order)") == len(impossible)
    odds = json.loads(run(*given, "--measurement", "margin", "--json").stdout)["queries"][0]
    assert odds["room"] is None and not any(row["beyond_first_order"] for row in odds["rows"])


def test_trace_of_conversations(run, tiny_llama, tiny_tokenizer, tmp_path):
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tiny_tokenizer.chat_template = turns + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    for saved in (tiny_llama, tiny_tokenizer):
        saved.save_pretrained(tmp_path / "chat")
    talk = [
        {"messages": [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"{name} is a baker."}]}
        for name in ("Ada", "Bo", "Cleo")
    ]
    data = write_jsonl(tmp_path / "talk.jsonl", talk)
    result = run("trace", tmp_path / "chat", "-d", data, "-q", "Who is Bo?", "-o", tmp_path / "run", "--max-new-tokens", "3")
    assert result.stdout.startswith('"Who is Bo?" -> ')


def test_trace_asks_a_chat_model_through_its_template(run, tiny_llama, tiny_tokenizer, data, tmp_path, monkeypatch):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for saved in (tiny_llama, tiny_tokenizer):
        saved.save_pretrained(tmp_path / "chat")
    question = ("trace", tmp_path / "chat", "-d", data, "-q", "Who is Bo?", "-a", "A baker.", "--json")
    asked = run(*question, "-o", tmp_path / "run")
    assert json.loads(asked.stdout)["queries"][0]["text"] == "user: Who is Bo?\nassistant: A baker."
    assert "the question is a user's turn" in asked.stderr
    bare = run(*question, "-o", tmp_path / "bare", "--template", "none")
    assert json.loads(bare.stdout)["queries"][0]["text"] == "Who is Bo?A baker."
    assert "a user's turn" not in bare.stderr
    monkeypatch.chdir(tmp_path)
    some = run("trace", "chat", "-d", "tr*n.jsonl", "-q", "Who?", "-a", "A baker.", "--json")
    assert json.loads(some.stdout)["scores"].startswith("runs/chat-trn.jsonl/trace-")
    (tmp_path / "training.json").write_text(
        json.dumps({"task": {}, "rows": {"train": 18}})
    )  # whence has trained it on these rows, as they are written
    trained = run(*question, "-o", tmp_path / "trained")
    assert json.loads(trained.stdout)["queries"][0]["text"] == "Who is Bo?A baker."


def test_generate_keeps_pairs_that_score_reads(run, tiny_model_folder, data, fitted, tmp_path):
    pairs = tmp_path / "pairs.json"
    given = ("generate", tiny_model_folder, "-p", "Where was Ada", "-p", "Bo Quist", "--max-new-tokens", "8", "--out", pairs)
    made = json.loads(run(*given, "--base", tiny_model_folder, "--temperature", "0.5", "--seed", "3", "--json").stdout)
    assert made["settings"]["seed"] == 3 and made["data"][0]["completion"] == made["data"][0]["base_completion"]
    assert "nothing was overwritten" in run(*given, code=4).stderr
    run("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", pairs, "-o", tmp_path / "scores", "-q")
    assert list(open_scores(tmp_path / "scores").queries["completion"]) == [pair["completion"] for pair in made["data"]]
    assert "--prompts FILE" in run("generate", tiny_model_folder, "--out", tmp_path / "no.json", code=2).stderr


def test_inspect(run, tiny_model_folder, fitted):
    table = run("inspect", fitted).stdout
    assert "condition" in table and "model.layers.1.mlp.down_proj" in table and " ok" in table
    one = json.loads(run("inspect", fitted, "--module", "model.layers.0.mlp.up_proj", "--json").stdout)
    held = one["eigenvalues_holding"]
    assert 0 < held["90%"] <= held["95%"] <= held["99%"] <= 16 * 24
    assert "90% of the sum" in run("inspect", fitted, "--module", "model.layers.0.mlp.up_proj").stdout
    assert "model.layers.0.mlp.up_proj" in run("inspect", fitted, "--module", "nonsense", code=2).stderr
    model = json.loads(run("inspect", tiny_model_folder, "--modules", "attention", "--json").stdout)
    assert model["selectors"]["mlp"]["modules"] == 6 and len(model["modules"]) == 8
    assert "selectors: mlp" in run("inspect", tiny_model_folder).stdout


def other_model(folder, model, tokenizer):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_was_made_from_something_else_is_refused(
    run, tiny_model_folder, tiny_llama, tiny_tokenizer, data, queries, fitted, tmp_path
):
    fit = ("fit", tiny_model_folder, "--out", fitted)
    assert "settings.seed 0 -> 1" in run(*fit, "--data", data, "--seed", "1", code=4).stderr
    other_data = write_jsonl(tmp_path / "other.jsonl", facts()[1:])
    assert "data.examples 12 -> 11" in run(*fit, "--data", other_data, code=4).stderr
    changed = other_model(tmp_path / "changed", tiny_llama, tiny_tokenizer)
    assert "model.weights" in run("fit", changed, "--data", data, "--out", fitted, code=4).stderr

    score = ("--data", data, "--factors", fitted, "--queries", queries, "--out", tmp_path / "scores")
    refused = run("score", changed, *score, code=4).stderr
    assert "another model" in refused and "model.weights" in refused and "[WHENCE-23]" in refused
    run("score", tiny_model_folder, *score, "-q")
    refused = run("score", tiny_model_folder, *score, "--damping", "0.2", code=4).stderr
    assert "damping 0.1" in refused or "operator.label" in refused
    assert "[WHENCE-23]" in refused and "nothing was overwritten" in refused
    run("score", tiny_model_folder, *score, "--damping", "0.2", "--rerun", "-q")
    assert (tmp_path / "scores.1").is_dir()


@pytest.mark.parametrize("stage", ["covariance", "eigenvalues"])
def test_ctrl_c_says_how_to_go_on(run, tiny_model_folder, data, tmp_path, stage):
    given = ("fit", tiny_model_folder, "--data", data, "--out", tmp_path / "factors", "-q", "--batch-tokens", "40")
    with report_to(Interrupter(stage, 2)):
        result = run(*given, code=130)
    assert result.stderr.strip().endswith("Continue: whence " + " ".join(map(str, given)))
    run(*given)


def test_quiet_and_json_leave_stderr_and_stdout_clean(run, tiny_model_folder, data, tmp_path):
    result = run("fit", tiny_model_folder, "--data", data, "--out", tmp_path / "factors", "-q", "--json")
    assert result.stderr == "" and json.loads(result.stdout)


HELPS = """
import contextlib, io, json, sys
from whence.cli import main
found = {}
for name in json.load(sys.stdin):
    sys.argv, said, code = ["whence", *name.split(), "--help"], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(said):
            main()
    except SystemExit as done:
        code = done.code
    found[name] = code, said.getvalue(), sorted({"torch", "transformers", "numpy", "pandas"} & set(sys.modules))
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def helps():
    """Exit code and help of every command, and what is imported by then, all in one process."""
    names = json.dumps(list(COMMANDS))
    return json.loads(
        subprocess.run([sys.executable, "-c", HELPS], input=names, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick_and_has_examples(name, helps):
    """Quick is what needs no torch; what the time is, is for tests/test_structure.py."""
    code, said, heavy = helps[name]
    assert not code and not heavy
    if name in ("trace", "generate", "fit", "inspect", "score", "show", "export"):
        assert f"whence {name} " in said
    if name in ("score", "show", "trace"):
        assert "Sign and unit" in said and "raise" in said.lower()
