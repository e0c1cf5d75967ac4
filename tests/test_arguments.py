"""What functions are given is checked as the command line is: bounds, types, and one thing in the place of another."""

import math
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from torch import nn

import whence
from whence.engine.point import Point
from whence.errors import UsageError
from whence.operators import Identity
from whence.settings import Data, Fit, Generate, Inspect, Lora, Measured, Score, Train
from whence.settings import Index as IndexSettings
from whence.store.scores import Scores


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (Score, {"n_train": -5}),
        (Score, {"n_train": 0}),
        (Score, {"rank": -5}),
        (Score, {"rank": "3"}),
        (Score, {"rank": True}),
        (Score, {"rescore": -3}),
        (Score, {"chunks": [8]}),
        (Score, {"norms": ("length",)}),
        (Score, {"batch_tokens": 0}),
        (Score, {"per": None}),
        (Fit, {"examples": -1}),
        (Fit, {"until": math.nan}),
        (Fit, {"groups": 2.5}),
        (Fit, {"draws": "2"}),
        (Fit, {"disjoint": "no"}),
        (Fit, {"method": "exact"}),
        (IndexSettings, {"dim": 0}),
        (Measured, {"damping": -0.1}),
        (Measured, {"damping": "0.1"}),
        (Measured, {"damping": math.inf}),
        (Measured, {"damping": True}),
        (Generate, {"temperature": -1}),
        (Generate, {"max_new_tokens": 0}),
        (Train, {"learning_rate": "2e-5"}),
        (Train, {"learning_rate": math.nan}),
        (Train, {"workers": -1}),
        (Train, {"bf16": 1}),
        (Lora, {"alpha": math.inf}),
        (Lora, {"r": 0}),
        (Inspect, {"clip_percentile": 101}),
        (Data, {"path": "x", "max_length": 1}),
        (Data, {"path": "x", "append_eos": "yes"}),
        (Data, {"path": "x", "limit": -3}),
        (Data, {"path": 3}),
    ],
)
def test_settings_are_checked_however_they_come(section, wrong):
    name = list(wrong)[-1]
    with pytest.raises(UsageError, match=rf"^{name} can't be "):
        section(**wrong)
    whole = section(path="x") if section is Data else section()
    with pytest.raises(UsageError, match=rf"^{name} can't be "):
        whole.changed(**{name: wrong[name]})


def test_numbers_of_numpy_are_numbers():
    assert Score().changed(rank=np.int64(4), n_train=np.int64(7)).rank == 4
    assert Measured(damping=np.float64(0.5)).damping == 0.5 and Measured(damping=1).damping == 1.0
    assert Score().changed(norms="cosine", aggregate="queries").norms == ("cosine",)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    rows = [(torch.randn(3).double(), torch.randint(2, ())) for _ in range(8)]
    return model, whence.Classification(), rows, whence.fit(model, whence.Classification(), rows)


@pytest.fixture(scope="module")
def scores(fitted):
    model, task, rows, curvature = fitted
    return whence.score(model, task, rows[:2], rows, curvature.inverse(damping=0.1))


@pytest.mark.parametrize("damping", [-0.1, "0.1", math.nan, math.inf, None, True, [0.1]])
def test_a_damping_is_a_number_from_zero(fitted, damping):
    for operator in (fitted[3], fitted[3].operator, Identity()):
        with pytest.raises(UsageError, match=r"damping can't be"):
            operator.inverse(damping)
        if damping is not None:
            with pytest.raises(UsageError, match=r"absolute can't be"):
                operator.inverse(absolute=damping)


def test_a_forgotten_inverse_is_named(fitted):
    model, task, rows, curvature = fitted
    index = whence.build_index(model, task, rows, dim=2)
    for ask in (
        lambda: whence.score(model, task, rows[:2], rows, curvature),
        lambda: whence.self_influence(model, task, rows, curvature),
        lambda: index.search(model, task, rows[:2], curvature),
    ):
        with pytest.raises(UsageError, match=r"(?s)a fitted curvature.*\.inverse\(damping=0\.1\)"):
            ask()
    with pytest.raises(UsageError, match="not an operator"):
        whence.score(model, task, rows[:2], rows, 0.1)
    with pytest.raises(UsageError, match=r"(?s)curvature can't be a BlockDiagonal.*open_factors"):
        whence.build_index(model, task, rows, curvature=curvature.inverse())


def test_models_tasks_and_settings_in_each_others_place_are_named(fitted, tiny_tokenizer):
    model, task, rows, curvature = fitted
    for wrong in ((model, None), "gpt2", task):
        with pytest.raises(UsageError, match=r"(?s)The model can't be a .*torch.nn.Module"):
            whence.fit(wrong, task, rows)
    with pytest.raises(UsageError, match=r"(?s)task can't be a .*whence\.CausalLM\(tokenizer\)"):
        whence.fit(model, tiny_tokenizer, rows)
    for ask in (
        lambda: whence.fit(model, task, rows, "ekfac"),
        lambda: whence.score(model, task, rows, rows, Identity(), 0.1),
        lambda: whence.build_index(model, task, rows, Score()),
    ):
        with pytest.raises(UsageError, match=r"(?s)settings can't be .*each setting as a keyword"):
            ask()
    with pytest.raises(UsageError, match="precision can't be 'float32'"):
        whence.fit(model, task, rows, precision="float32")
    with pytest.raises(UsageError, match="save_every can't be -1"):
        whence.fit(model, task, rows, save_every=-1)
    with pytest.raises(UsageError, match="batch_tokens can't be -1"):
        Point(model, task, rows, batch_tokens=-1)


@pytest.mark.parametrize("rows", [[99], [-1], [1.5], [True], [], ["nothing"]])
def test_rows_to_score_are_there(fitted, rows):
    model, task, train, curvature = fitted
    with pytest.raises(UsageError, match=r"row"):
        whence.score(model, task, train[:1], train, curvature.inverse(), rows=rows)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s: s.top(5), "No query number 5"),
        (lambda s: s.top(0.5), "query can't be 0.5"),
        (lambda s: s.top(True), "query can't be True"),
        (lambda s: s.top("who"), "No query 'who'"),
        (lambda s: s.top(0, -1), "k can't be -1"),
        (lambda s: s.top(0, "3"), "k can't be '3'"),
        (lambda s: s.hubs(0), "k can't be 0"),
        (lambda s: s.rank_of("nobody"), "No example 'nobody'"),
        (lambda s: s.rank_of(99), "No example number 99"),
        (lambda s: s.by("town"), "no 'town'"),
        (lambda s: s.normalised("l2"), "no normalisation 'l2'"),
        (lambda s: s * math.nan, "factor can't be nan"),
        (lambda s: s * "2", "factor can't be '2'"),
        (lambda s: replace(s, n_train=-5), "n_train can't be -5"),
        (lambda s: math.inf * Identity(), "factor can't be inf"),
    ],
)
def test_scores_say_what_there_is(scores, ask, words):
    with pytest.raises(UsageError, match=words):
        ask(scores)


def test_no_rows_and_the_last_ones_can_be_asked_for(scores):
    assert len(scores.top(0, 0)) == 0 and scores.rank_of(scores.example_ids[3]) == scores.rank_of(3)
    assert list(scores.top(-1)["id"]) == list(scores.top(np.int64(1))["id"])
    with pytest.raises(TypeError):
        scores + 1


def test_token_scores_are_of_examples_that_are_there():
    examples = pandas.DataFrame({"id": ["a", "b"], "tokens": [2, 1], "text": ["", ""], "source": None, "copies": 1})
    queries = pandas.DataFrame({"id": ["q"], "text": [""]})
    found = Scores(np.ones((1, 2)), 2, examples, queries, tokens=np.arange(3.0)[None])
    assert found.token_scores(0, "b").tolist() == found.token_scores(0, -1).tolist() == [1.0]
    for wrong in (2, "c", 0.5):
        with pytest.raises(UsageError, match="example"):
            found.token_scores(0, wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length can't be 1"),
        ({"max_length": "512"}, "max_length can't be '512'"),
        ({"append_eos": "yes"}, "append_eos can't be 'yes'"),
        ({"padding_side": "middle"}, "padding_side can't be 'middle'"),
        ({"measurement": "accuracy"}, "no such measurement"),
    ],
)
def test_tasks_of_text_are_checked(tiny_tokenizer, options, words):
    with pytest.raises(UsageError, match=words):
        whence.CausalLM(tiny_tokenizer, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Once",), r"(?s)prompts can't be one text.*\[prompt\]"),
        (([{"prompt": "Once"}],), r'(?s)prompts can\'t be a dict.*row\["prompt"\]'),
        ((["Once"], 0), "max_new_tokens can't be 0"),
        ((["Once"], 4, -1.0), "temperature can't be -1.0"),
        ((["Once"], 4, 0.0, "a"), "seed can't be 'a'"),
        ((["Once"], 4, 0.0, 0, -8), "batch_size can't be -8"),
    ],
)
def test_prompts_are_a_list_of_texts(tiny_llama, tiny_tokenizer, arguments, words):
    with pytest.raises(UsageError, match=words):
        whence.generate(tiny_llama, tiny_tokenizer, *arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float31"}, "dtype can't be 'float31'"),
        ({"device": "gpu"}, "device can't be 'gpu'"),
    ],
)
def test_models_are_loaded_on_what_there_is(tiny_model_folder, options, words):
    with pytest.raises(UsageError, match=words):
        whence.load_model(tiny_model_folder, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((["a text"],), {}, "path can't be a list"),
        (("rows.jsonl",), {"columns": "text"}, "columns can't be 'text'"),
        (("rows.jsonl",), {"limit": -1}, "limit can't be -1"),
        (("rows.jsonl",), {"limit": "3"}, "limit can't be '3'"),
    ],
)
def test_data_is_loaded_from_a_path(arguments, options, words):
    with pytest.raises(UsageError, match=words):
        whence.load_data(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": 24}, r"(?s)memory=24 is 24 bytes.*memory=24 \* 10\*\*9"),
        ({"disk": -1}, "disk can't be -1"),
        ({"memory": "24GB"}, "memory can't be '24GB'"),
        ({"queries": 0}, "queries can't be 0"),
        ({"rank": -5}, "rank can't be -5"),
    ],
)
def test_plans_are_for_budgets_in_bytes(fitted, options, words):
    model, task, rows, _ = fitted
    with pytest.raises(UsageError, match=words):
        whence.plan(model, task, rows, calibrate=False, **options)
