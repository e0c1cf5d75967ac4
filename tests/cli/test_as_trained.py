"""Commands on a model that whence trained read text as its training did, say so, and warn when told otherwise."""

import json

import pytest
from facts import facts, write_jsonl

from whence.store.manifest import Folder
from whence.store.scores import open_scores

READING = {"format": "qa", "normalise": {"unicode": "NFKC"}, "max_length": 64, "chat_template": None, "append_eos": True}
SAID = "as in training ("


@pytest.fixture
def trained(tmp_path, tiny_llama, tiny_tokenizer):
    """A folder as `whence train` leaves it, as far as readers of its model look."""
    folder = tmp_path / "train"
    tiny_llama.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "training.json").write_text(json.dumps({"task": {"max_length": 64}, "reading": READING}))
    return folder / "model"


def task_of(folder) -> dict:
    return Folder.open(folder).provenance["task"]


def test_fit_score_and_preview_read_as_in_training(run, trained, data, queries, tmp_path):
    fitted = run("fit", trained, "-d", data, "-o", tmp_path / "factors", "--method", "identity").stderr
    assert f"{SAID}{trained.parent / 'training.json'}): format qa, normalise" in fitted and "append_eos True" in fitted
    assert (task_of(tmp_path / "factors")["max_length"], task_of(tmp_path / "factors")["append_eos"]) == (64, True)

    asked = ("--queries", queries, "-f", tmp_path / "factors", "-o", tmp_path / "scores")
    assert SAID in run("score", trained, "-d", data, *asked).stderr
    scores = open_scores(tmp_path / "scores")
    assert task_of(tmp_path / "scores")["max_length"] == 64
    assert scores.queries["prompt"][0] == "Question: Where was Ada Velt born?\nAnswer:"
    assert scores.queries["completion"][0] == " In Turin, where else."
    assert scores.examples["text"][0].startswith("Question: Where was Ada Velt born?\nAnswer: In Turin")

    shown = run("data", "preview", data, "--model", trained, "--top", "1", "--json")
    tokens = json.loads(shown.stdout)["rows"][0]["tokens"]
    assert "".join(token["text"] for token in tokens).startswith("Question: ") and tokens[-1]["text"] == "</s>"


def test_what_is_said_counts_and_is_warned_of(run, trained, data, tmp_path):
    options = ("--format", "plain", "--max-length", "80", "--no-append-eos")
    said = run("fit", trained, "-d", data, "-o", tmp_path / "factors", "--method", "identity", *options).stderr
    assert "warning: not read as in training" in said and "max_length 80, in training 64" in said
    assert "format plain, in training qa" in said and "append_eos False, in training True" in said
    assert (task_of(tmp_path / "factors")["max_length"], task_of(tmp_path / "factors")["append_eos"]) == (80, False)
    same = run(
        "fit", trained, "-d", data, "-o", tmp_path / "same", "--method", "identity", "--format", "qa", "--max-length", "64"
    )
    assert "warning: not read" not in same.stderr


def test_rows_that_are_written_already_are_not_written_twice(run, trained, tmp_path):
    rows = [{"prompt": f"Question: {row['prompt']}\nAnswer:", "completion": row["completion"]} for row in facts()]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    shown = run("data", "preview", data, "--model", trained, "--top", "1")
    assert shown.stdout.count("Question: ") == 1 and "are already written as qa" in shown.stderr


def test_trace_generate_plan_and_index_take_it_too(run, trained, data, tmp_path):
    said = run("trace", trained, "-d", data, "-q", "Where was Bo Quist born?", "-o", tmp_path / "run", "--max-new-tokens", "2")
    assert SAID in said.stderr and '"Question: Where was Bo Quist born? Answer:"' in said.stdout
    out = tmp_path / "pairs.json"
    said = run("generate", trained, "-p", "Where was Bo Quist born?", "-o", out, "--max-new-tokens", "2").stderr
    assert "format qa" in said and "max_length" not in said
    assert json.loads(out.read_text())["data"][0]["prompt"] == "Question: Where was Bo Quist born?\nAnswer:"
    (tmp_path / "listed.json").write_text('["Where was Bo Quist born?"]')
    run("generate", trained, "--prompts", tmp_path / "listed.json", "-o", tmp_path / "listed.out.json", "--max-new-tokens", "2")
    assert json.loads((tmp_path / "listed.out.json").read_text())["data"] == json.loads(out.read_text())["data"]
    said = run("generate", trained, "-p", "x", "-o", tmp_path / "p.json", "--max-new-tokens", "2", "--format", "plain").stderr
    assert "warning: not read as in training" in said
    assert SAID in run("plan", trained, "-d", data, "--queries", "2", "--no-calibrate").stderr
    assert SAID in run("index", "build", trained, "-d", data, "-o", tmp_path / "index", "--dim", "2").stderr
    assert task_of(tmp_path / "index")["append_eos"] is True


def test_factors_say_how_their_rows_were_read(run, tiny_model_folder, data, queries, tmp_path):
    run(
        "fit", tiny_model_folder, "-d", data, "-o", tmp_path / "f", "--method", "identity", "--append-eos", "--max-length", "70"
    )
    run("score", tiny_model_folder, "-d", data, "-f", tmp_path / "f", "--queries", queries, "-o", tmp_path / "scores")
    assert (task_of(tmp_path / "scores")["max_length"], task_of(tmp_path / "scores")["append_eos"]) == (70, True)


def test_a_run_of_trained_weights_reads_as_they_were_trained(run, trained, data, tmp_path):
    settings = {
        "run": "r",
        "model": {"base": str(trained)},
        "data": {"path": str(data)},
        "prompts": {"items": ["Where was Ada Velt born?"]},
        "generate": {"max_new_tokens": 2},
        "fit": {"method": "identity"},
    }
    (tmp_path / "whence.yaml").write_text(json.dumps(settings))
    said = run("run", tmp_path, "generate", "fit").stderr
    assert f"{SAID}{trained.parent / 'training.json'})" in said
    assert task_of(tmp_path / "runs" / "r" / "factors")["append_eos"] is True
    kept = (tmp_path / "runs" / "r" / "whence.yaml").read_text()
    assert "format: qa" in kept and "max_length: 64" in kept
    (pair,) = json.loads((tmp_path / "runs" / "r" / "generate" / "generated.json").read_text())["data"]
    assert pair["prompt"].startswith("Question: ")
    assert "unchanged" in run("run", tmp_path, "generate", "fit").stderr


def test_a_damaged_record_is_named(run, trained, data, tmp_path):
    (trained.parent / "training.json").write_text('{"reading"')
    said = run("fit", trained, "-d", data, "-o", tmp_path / "factors", code=4).stderr
    assert f"{trained.parent / 'training.json'} is damaged" in said


def test_checkpoints_belong_to_a_training_and_other_files_do_not(run, trained, data, tmp_path):
    place = trained.parent / "checkpoints" / "checkpoint-2"
    place.parent.mkdir()
    trained.rename(place)
    assert SAID in run("data", "preview", data, "--model", place).stderr
    for other in ("[1]", '{"epochs": 3}'):
        (trained.parent / "training.json").write_text(other)
        assert SAID not in run("data", "preview", data, "--model", place).stderr
