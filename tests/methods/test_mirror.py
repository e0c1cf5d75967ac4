"""Mirrored runs repeat the recorded training along with a query; checkpoints are averaged."""

import numpy as np
import pytest
import torch
from killing import Killed, Killer, killed_and_resumed
from models import texts, tokenizer
from oracle import agree
from torch import nn
from trainings import trained

from benchmarks.oracles.base import Case
from benchmarks.oracles.training import ORACLES as OF_CHECKPOINTS
from benchmarks.oracles.unrolled import ORACLES
from whence.data import as_rows
from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.fitting import fit
from whence.methods.base import attribute
from whence.models import load_model
from whence.progress import report_to
from whence.settings import Score
from whence.tasks import CausalLM, Regression
from whence.train import replicas
from whence.train.record import read_training
from whence.validate.trainer import Recipe, recorded, retrain

ROWS, QUERIES = as_rows(texts(7, seed=1)), as_rows(texts(6, seed=2)[::2])
SETTINGS = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 2, "evaluation": 0, "log_steps": 1, "save_steps": 2, "keep": None}
WAYS = {
    "adamw": {"weight_decay": 0.1, "max_grad_norm": 0.5},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "gradient_accumulation": 2, "drop_last": False},
    "lora": {"lora": {"r": 2, "dropout": 0.0, "targets": "all-linear"}, "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("mirror"), ROWS, SETTINGS, WAYS)


def scored(folder, method="mirror", queries=QUERIES, settings=Score(), **options):
    training = read_training(folder)
    model = load_model(training.model)[0]
    return attribute(method, model, CausalLM(tokenizer()), queries, ROWS, settings, training=training, **options)


def case_of(folder):
    training = read_training(folder)
    return Case(load_model(training.model)[0], CausalLM(tokenizer()), ROWS, QUERIES, training)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("adamw", {}),
        ("adamw", {"share": 0.5, "complement": True, "start": 0.3, "eps": 0.5, "seed": 3, "together": 1}),
        ("sgd", {"start": 0.0, "together": 2}),
        ("lora", {"eps": 0.02}),
    ],
)
def test_it_is_its_oracle(trainings, way, options):
    found = scored(trainings / way, **options)
    settings = {name: value for name, value in options.items() if name != "together"}
    expected = ORACLES["mirror"](case_of(trainings / way), **settings)
    agree(found.values, expected, 5e-3)  # differences of two losses in float32
    assert found.unit == "nats per copy" and found.n_train == 1
    assert found.about["own gain"] > 0 or way == "lora"  # whose rate is too high to learn anything


def test_of_a_convex_model_it_is_influence():
    """Weight decay makes the optimum that of mean loss + decay / 2 |theta|^2, whose influence is damped by the decay."""
    torch.manual_seed(0)
    x = torch.randn(12, 4).double()
    rows, queries = [(each[:3], each[3:]) for each in x[:9]], [(each[:3], each[3:]) for each in x[9:]]
    recipe = Recipe(0.2, 400, 9, "sgd", weight_decay=0.3)
    given = (nn.Linear(3, 1).double(), Regression(), rows, recipe)
    model, training = retrain(*given).copy_of(0), recorded(*given)
    case = Case(model, Regression(), rows, queries)
    exact = case.m_QP @ torch.linalg.solve(case.gauss_newton_PP + 0.3 * torch.eye(4), case.g_NP.T) / len(rows)

    def error(eps):
        found = attribute("mirror", model, Regression(), queries, rows, training=training, eps=eps, start=0.0)
        return float((torch.from_numpy(found.values) - exact).norm() / exact.norm())

    assert error(1e-4) < 0.01 < error(3.0)


def test_it_says_how_far_it_is_from_ekfac_and_mixes_with_it(trainings):
    training = read_training(trainings / "adamw")
    given = (load_model(training.model)[0], CausalLM(tokenizer()))
    factors = fit(*given, ROWS)
    alone = scored(trainings / "adamw")
    beside = scored(trainings / "adamw", factors=factors)
    mixed = scored(trainings / "adamw", factors=factors, ekfac=0.5)
    assert "correlation with EK-FAC" not in alone.about and -1 <= beside.about["correlation with EK-FAC"] <= 1
    np.testing.assert_array_equal(alone.raw, beside.raw)
    ekfac = attribute("ekfac", *given, QUERIES, ROWS, factors=factors)
    size = [np.sqrt((each.raw**2).mean(1, keepdims=True)) for each in (alone, ekfac)]
    agree(mixed.raw, (alone.raw + 0.5 * ekfac.raw * size[0] / size[1]) / 1.5, 1e-6)
    with pytest.raises(UsageError, match="weight"):
        alone.combined(ekfac, -1.0)


def test_a_killed_run_resumes(trainings, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.engine.trials.SaveTimer.due", True)
    seen = killed_and_resumed(lambda out: scored(trainings / "adamw", together=1, out=out), tmp_path, "mirror", 3)
    assert "repeat" not in seen.done and seen.done["mirror"] == 1  # of three, the two before the kill are kept


def test_work_that_was_begun_with_more_queries_side_by_side_is_refused(trainings, tmp_path, monkeypatch):
    """As on another kind of device, which decides otherwise: its parts would not fit."""
    with pytest.raises(Killed), report_to(Killer("mirror", 1, "begin")):
        scored(trainings / "adamw", out=tmp_path)
    monkeypatch.setitem(replicas.SHORT, "cpu", 0)
    with pytest.raises(StaleArtifact, match=r"together 3 -> 1"):
        scored(trainings / "adamw", out=tmp_path)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_model_that_the_training_did_not_end_with_is_refused(trainings, share):
    training, own = read_training(trainings / "adamw"), {"share": share, "together": 1}
    with pytest.raises(NumericalError, match="does not end at the model"):
        attribute("mirror", load_model(trainings / "base")[0], CausalLM(tokenizer()), QUERIES, ROWS, training=training, **own)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_checkpoints_are_averaged_in_one_metric(trainings, start):
    found = scored(trainings / "adamw", "checkpoint-mean", start=start)
    agree(found.values, OF_CHECKPOINTS["checkpoint-mean"](case_of(trainings / "adamw"), start=start), 1e-4)
    kept = [each.step for each in read_training(trainings / "adamw").checkpoints]
    count = sum(step >= start * 6 for step in kept)
    assert count and f"{count} checkpoints" in found.about["operator"] and found.unit == "nats per copy"


def test_no_checkpoint_is_left(trainings, monkeypatch):
    training = read_training(trainings / "adamw")
    early = [each for each in training.checkpoints if each.step < 4]
    monkeypatch.setattr("whence.train.record.find_checkpoints", lambda folder: early)
    with pytest.raises(UsageError, match="No checkpoint is left"):
        scored(trainings / "adamw", "checkpoint-mean", start=0.9)
