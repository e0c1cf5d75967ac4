"""One object for model, rows and results: what it reads, keeps, takes from disk and refuses; numbers are the functions'."""

import json
import sys

import numpy as np
import pytest

import whence
from whence.errors import UsageError
from whence.run import Run
from whence.settings import Data
from whence.tasks import CausalLM

ROWS = [
    {"prompt": f"Where was {person} born?", "completion": f" In {town}.", "source": town}
    for person, town in [("Ada Velt", "Turin"), ("Bo Quist", "Oslo"), ("Cleo Marsh", "Lyon"), ("Dag Holm", "Ghent")]
    for _ in range(2)
]
QUERIES = [{"prompt": "Where was Ada Velt born?", "completion": " In Oslo."}]
SETTINGS = {"max_length": 64, "append_eos": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_tokenizer_file):
    """A tiny model with its rows in a folder, as users keep them."""
    from trainings import save_llama

    folder = tmp_path_factory.mktemp("home")
    save_llama(folder / "model", tiny_tokenizer_file)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def run(home):
    """A run with one question traced."""
    run = whence.open(home / "model", data=home / "train.jsonl", out=home / "run", dtype="float32", **SETTINGS)
    run.fit(examples="all", products="float32")
    run.trace("Where was Ada Velt born?", " In Oslo.", products="float32")
    return run


def test_its_scores_are_those_of_the_functions(home, run, tmp_path):
    model, tokenizer = whence.load_model(home / "model", dtype="float32")
    task, rows = CausalLM(tokenizer, 64, append_eos=True), whence.load_data(home / "train.jsonl")
    chosen = {"products": "float32", "out": tmp_path / "factors"}  # in as many chunks, which decide the order of sums
    curvature = whence.fit(model, task, rows, examples="all", **chosen)
    chosen["out"] = tmp_path / "scores"
    expected = whence.score(model, task, QUERIES, rows, curvature.inverse(), per="token", **chosen)
    np.testing.assert_array_equal(run.scores.raw, expected.raw)
    np.testing.assert_array_equal(run.scores.tokens, expected.tokens)
    assert run.scores.example_ids == list(rows.ids)


def test_what_was_asked_is_not_computed_again(home, run, monkeypatch):
    again = whence.open(home / "model", data=home / "train.jsonl", out=home / "run", dtype="float32", **SETTINGS)
    again.fit(examples="all", products="float32")
    monkeypatch.setattr(sys.modules["whence.scoring.score"]._Score, "columns", None)
    scores = again.trace("Where was Ada Velt born?", " In Oslo.", products="float32")
    np.testing.assert_array_equal(scores.raw, run.scores.raw)
    assert again.folder_of(scores) == run.folder_of(run.scores) and again.folder_of(scores).parent == home / "run"


def test_a_method_and_a_search_answer_the_same_question(run):
    words = run.score(QUERIES, method="bm25")
    assert words.about["method"] == "bm25" and tuple(words.example_ids) == run.rows.ids
    with pytest.raises(UsageError, match="not by bm25"):
        run.check(words)
    found = run.search(run.ask(QUERIES), exact=2)
    exact = run.score(QUERIES, products="float32")
    for name in found.example_ids:
        assert found.values[0, found.column_of(name)] == pytest.approx(exact.values[0, exact.column_of(name)], rel=1e-4)


def test_the_check_is_kept_beside_the_scores_and_is_in_the_report(home, run, tmp_path):
    scores = run.score(QUERIES, products="float32")
    result = run.check(scores)
    assert result.check == "quick" and (run.folder_of(scores) / "quick.json").is_file()
    (page,) = run.report(tmp_path / "page.html", scores)
    text = page.read_text(encoding="utf-8")
    assert "a copy of the question ranks first" in text and "In Oslo." in text
    with pytest.raises(UsageError, match="nothing is overwritten"):
        run.report(tmp_path / "page.html", scores)


def test_a_question_is_not_taken_for_the_name_of_a_file(run, tmp_path):
    with pytest.raises(UsageError, match=r"There is no file 'Where was Ada Velt born\?'") as raised:
        run.score("Where was Ada Velt born?")
    assert "run.trace" in raised.value.fix
    file = tmp_path / "my questions.jsonl"
    file.write_text(json.dumps(QUERIES[0]))
    assert len(run.ask(str(file))) == len(run.ask(str(tmp_path / "my q*.jsonl"))) == 1


def test_in_memory_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = whence.open((run.model, run.tokenizer), data=ROWS, **SETTINGS)
    scores = other.score(QUERIES, products="float32")
    assert other.out is None and other.folder_of(scores) is None and not list(tmp_path.iterdir())
    np.testing.assert_allclose(scores.raw, run.score(QUERIES, products="float32").raw, rtol=1e-5)
    assert other.self_influence(products="float32").shape == (1, 8)


def test_the_reading_is_that_of_the_training(home, tmp_path, notes):
    record = {"rows": {"train": 5}, "reading": {"max_length": 33, "append_eos": True}}
    (home / "training.json").write_text(json.dumps(record))
    try:
        run = whence.open(home / "model", data=home / "train.jsonl", out=tmp_path)
        assert (run.reading.max_length, run.reading.append_eos, run.n_train) == (33, True, 5)
        said = whence.open(home / "model", data=home / "train.jsonl", out=tmp_path, max_length=20)
        assert said.reading.max_length == 20 and any("not read as in training" in text for text in notes)
        (home / "rows.jsonl").write_text("".join(json.dumps({"id": f"r{n}", **row}) + "\n" for n, row in enumerate(ROWS[:5])))
        own = whence.open(home, out=tmp_path)  # a folder of whence train: its model, its rows
        assert own.name == str(home / "model") and own.rows.ids == ("r0", "r1", "r2", "r3", "r4")
    finally:
        (home / "training.json").unlink()


def test_what_is_known_is_said_without_loading_anything(home, run):
    other = whence.open(home / "model", data=home / "train.jsonl", out=home / "run")
    assert "loaded" not in vars(other) and "rows" not in vars(other)
    said = repr(other)
    assert "factors: finished" in said and "trace-" in said and "train.jsonl" in said
    assert "<table" in other._repr_html_() and "loaded" not in vars(other) and "rows" not in vars(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "no-such-model"}, "the model was trained on is not given"),
        ({"model": 3, "data": ROWS}, "can't be a int"),
        ({"model": "m", "data": "d", "max_lenght": 3}, "no setting 'max_lenght'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        whence.open(**arguments)


def test_a_model_without_weights_in_memory_is_planned_by_its_config(home, tmp_path):
    run = whence.open(home / "model", data=home / "train.jsonl", out=tmp_path, max_length=64)
    plan = run.plan(queries=2, calibrate=False)
    assert "loaded" not in vars(run) and plan.fits
    assert repr(plan).startswith("Plan(") and len(repr(plan)) < 300


def test_it_is_named_by_model_and_data(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    run = Run("model", Data(path="train.jsonl"))
    assert str(run.out) == "runs/model-train"
