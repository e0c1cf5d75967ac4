"""MAGIC differentiates the recorded training exactly, however it was trained, killed or shared out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import CASES, gpt2, texts, tokenizer
from oracle import agree
from torch import nn
from trainings import trained

from benchmarks.oracles.base import Case
from benchmarks.oracles.unrolled import ORACLES, rerun
from whence.data import as_rows
from whence.errors import CoverageError, NumericalError, UsageError
from whence.methods.base import attribute
from whence.models import load_model
from whence.settings import Score
from whence.tasks import CausalLM, Regression
from whence.train.record import read_training
from whence.validate.problem import Problem
from whence.validate.trainer import Recipe, recorded, retrain

ROWS, QUERIES = as_rows(texts(7, seed=1)), as_rows(texts(6, seed=2)[::2])
SETTINGS = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 2, "drop_last": False, "evaluation": 0, "log_steps": 1}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""GPT-2 without dropout, which computes in float64 throughout (Llama's norms don't), as differences need."""
WAYS = {
    "gpt2": {"weight_decay": 0.1, "max_grad_norm": 0.5, "arguments": {"adam_epsilon": 1e-5}},
    "adamw": {"weight_decay": 0.1, "max_grad_norm": 0.5},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, "gradient_accumulation": 2},
    "lora": {"lora": {"r": 2, "dropout": 0.0, "targets": "all-linear"}, "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("magic")
    trained(folder, ROWS, SETTINGS, {"gpt2": WAYS["gpt2"]}, lambda: gpt2(**DRY), "other")
    return trained(folder, ROWS, SETTINGS, {way: WAYS[way] for way in WAYS if way != "gpt2"})


def magic(folder, queries=QUERIES, rows=ROWS, settings=Score(), **options):
    training = read_training(folder)
    options = {"training": training, "dtype": "float64", **options}
    return attribute("magic", load_model(training.model)[0], CausalLM(tokenizer()), queries, rows, settings, **options)


def case_of(folder):
    training = read_training(folder)
    return Case(load_model(training.model)[0], CausalLM(tokenizer()), ROWS, QUERIES, training)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_its_oracle(trainings, way):
    expected = ORACLES["magic"](case_of(trainings / way))
    found = magic(trainings / way)
    assert np.abs(expected).max() > 0.01
    agree(found.values, expected, 1e-6)
    agree(magic(trainings / way, dtype="float32", together=1).values, expected, 1e-3)
    assert found.unit == "nats per copy" and found.n_train == 1 and found.about["drift"] < 1e-4
    assert found.about["operator"] == "MAGIC" and found.about["steps"] == (4 if way == "sgd" else 8)


def test_it_gives_finite_differences_of_the_recorded_run(trainings):
    case, h = case_of(trainings / "gpt2"), 1e-6
    problem = Problem(case.model, case.task, case.rows, case.queries)

    def measured(row, change):
        w_N = torch.ones(len(ROWS)).double()
        w_N[row] += change
        return problem.measured(rerun(case, problem, w_N).detach())

    slopes = torch.stack([(measured(row, h) - measured(row, -h)) / (2 * h) for row in range(len(ROWS))], 1)
    found = magic(trainings / "gpt2")
    agree(found.values, slopes, 1e-4)
    agree(found.queries["measured"].to_numpy(), problem.measured(), 1e-4)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_training_in_memory_gives_the_differences_of_retraining(optimizer):
    case, h = replace(CASES["gpt2"], build=lambda: gpt2(**DRY)), 1e-6
    recipe = Recipe(0.02, 2, 4, optimizer, weight_decay=0.1, schedule="cosine", eps=1e-5)
    given = (case.model(), case.task(), case.train(), recipe)
    count = len(case.train())
    eye = torch.eye(count).double()
    weights = torch.cat([torch.ones_like(eye[:1]), 1 + h * eye, 1 - h * eye])
    replicas = retrain(*given, weights, start="given", together=32)
    up_NQ, down_NQ = replicas.measurements(case.queries())[1:].split(count)
    asked, training = (replicas.copy_of(0), case.task(), case.queries(), case.train()), recorded(*given, start="given")
    found = attribute("magic", *asked, training=training, dtype="float64")
    agree(found.values, ((up_NQ - down_NQ) / (2 * h)).T, 1e-4)


def test_at_an_optimum_it_is_influence():
    """Weight decay makes the optimum that of mean loss + decay / 2 |theta|^2, whose influence is damped by the decay."""
    torch.manual_seed(0)
    x = torch.randn(12, 4).double()
    rows, queries = [(each[:3], each[3:]) for each in x[:9]], [(each[:3], each[3:]) for each in x[9:]]
    recipe = Recipe(0.2, 400, 9, "sgd", weight_decay=0.3)
    given = (nn.Linear(3, 1).double(), Regression(), rows, recipe)
    model = retrain(*given).copy_of(0)
    found = attribute("magic", model, Regression(), queries, rows, training=recorded(*given), dtype="float64")
    case = Case(model, Regression(), rows, queries)
    damped = case.gauss_newton_PP + 0.3 * torch.eye(4)
    agree(found.values, case.m_QP @ torch.linalg.solve(damped, case.g_NP.T) / len(rows), 1e-6)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "warned"), [("adamw", "cosine", 1), ("adamw", "warm-up", 0), ("sgd", "cosine", 0)]
)
def test_rows_of_a_first_step_that_has_no_slope_are_warned_of(notes, optimizer, schedule, warned):
    case = replace(CASES["gpt2"], build=lambda: gpt2(**DRY))
    given = (case.model(), case.task(), case.train(), Recipe(0.02, 2, 2, optimizer, schedule=schedule, eps=1e-5))
    model = retrain(*given, start="given").copy_of(0)
    attribute(
        "magic", model, case.task(), case.queries(), case.train(), training=recorded(*given, start="given"), dtype="float64"
    )
    assert sum("of the 2 rows read in it may be far off" in text for text in notes) == warned


def test_rows_that_no_step_read_did_nothing(trainings):
    rows = as_rows([*ROWS, {"text": "w1 w2 w3 w4"}])
    found = magic(trainings / "adamw", rows=rows)
    assert (found.values[:, -1] == 0).all() and (found.values[:, :-1] != 0).all()


@pytest.mark.parametrize(
    ("stage", "left", "again"), [("replay", 5, {"replay": 5, "differentiate": 8}), ("differentiate", 2, {"differentiate": 3})]
)
def test_a_killed_run_resumes(trainings, tmp_path, stage, left, again):
    seen = killed_and_resumed(lambda out: magic(trainings / "adamw", out=out), tmp_path, stage, left)
    assert seen.done == again


def test_several_processes_give_the_same(trainings, tmp_path):
    expected = magic(trainings / "adamw").values
    for found in run(work.differentiated, trainings / "adamw", QUERIES, ROWS, tmp_path / "two"):
        agree(found, np.concatenate([expected, expected[:1]]), 1e-9)


def test_another_model_and_what_can_not_be_differentiated_twice_is_refused(trainings, monkeypatch):
    training = read_training(trainings / "adamw")
    base = load_model(trainings / "base")[0]
    with pytest.raises(NumericalError, match="does not end at the model"):
        attribute("magic", base, CausalLM(tokenizer()), QUERIES, ROWS, training=training)
    with pytest.raises(UsageError, match="needs training"):
        attribute("magic", base, CausalLM(tokenizer()), QUERIES, ROWS)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g.detach() * 1

    once = case_of(trainings / "adamw").task
    monkeypatch.setattr(type(once), "outputs", outputs_through(Once.apply, type(once).outputs))
    with pytest.raises(CoverageError, match="can't be differentiated"):
        magic(trainings / "adamw")


def outputs_through(function, outputs):
    return lambda task, model, batch: replace(found := outputs(task, model, batch), h_BTV=function(found.h_BTV))
