"""SOURCE is its formula with dense matrices, and at both ends of training what it should be: influence, and gradient dot."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from inverses import QUERIES, ROWS
from killing import killed_and_resumed
from models import gpt2, randomised, tokenizer
from oracle import agree
from torch import nn

from benchmarks.oracles.base import Case
from benchmarks.oracles.unrolled import ORACLES
from whence.errors import UsageError
from whence.fitting import fit
from whence.fitting.mean import mean_curvature
from whence.linalg.descent import caught_up
from whence.methods.base import attribute
from whence.models import load_model
from whence.settings import Score, Train
from whence.tasks import CausalLM, Regression
from whence.train.finetune import finetune
from whence.train.record import read_training
from whence.validate.trainer import Recipe, recorded, retrain

FOLDER = tempfile.TemporaryDirectory()
MODULES = "transformer.h.*.mlp.*"


@functools.cache
def folder(optimizer):
    """Of a training that kept three checkpoints of 2 steps each, and took a step more."""
    out, chosen = Path(FOLDER.name) / optimizer, {"optimizer": optimizer, "arguments": {}}
    if optimizer == "sgd":
        chosen = {"optimizer": "sgd", "learning_rate": 0.2, "arguments": {"optim_args": "momentum=0.5"}}
    settings = {"learning_rate": 1e-2, "max_steps": 7, "batch_size": 4, "save_steps": 2, "log_steps": 1, "keep": 4}
    settings = Train(**{**settings, "evaluation": 0, **chosen})
    torch.manual_seed(0)
    finetune(randomised(gpt2()).eval(), CausalLM(tokenizer()), ROWS, settings, out=out, seed=0)
    return out


def trained(optimizer):
    record = read_training(folder(optimizer))
    record = replace(record, checkpoints=[each for each in record.checkpoints if each.step < 7])
    return Case(load_model(record.model)[0].double(), CausalLM(tokenizer()), ROWS, QUERIES, record)


def source(case, settings=Score(), **given):
    model, task = case.model, case.task
    return attribute("source", model, task, case.queries, case.rows, settings, training=case.training, **given)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("given", [{"segments": 1}, {"segments": 2}, {"segments": 2, "curvature": "diagonal"}], ids=str)
def test_it_is_its_oracle(optimizer, given):
    case = trained(optimizer)
    assert [each.step for each in case.training.checkpoints] == [2, 4, 6]
    found = source(case, **given)
    agree(found.values, ORACLES["source"](case, **given), 1e-6)
    assert found.unit == "nats per copy" and found.n_train == len(ROWS)
    assert found.about["operator"].startswith(f"SOURCE, {given['segments']} segments of 3 checkpoints")


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def in_memory(rate, weight_decay=0.0):
    """A training of SGD in memory with one checkpoint, the last, whose model it is."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
    rows, queries = [(each[:3], each[3:]) for each in x[:9]], [(each[:3], each[3:]) for each in x[9:]]
    given = (perceptron(), Regression(), rows, Recipe(rate, 2, 3, "sgd", weight_decay=weight_decay))
    training = recorded(*given, checkpoints=[6], progress="")
    return Case(retrain(*given, progress="").copy_of(0), Regression(), rows, queries, training)


def with_rates(case, rate):
    how = case.training.how
    return replace(case, training=replace(case.training, how=replace(how, learning_rates=np.full(len(how.steps), rate))))


def test_one_segment_of_endless_steps_is_influence_damped_by_the_weight_decay():
    case = with_rates(in_memory(0.05, weight_decay=1e-3), 1e9)
    agree(source(case, segments=1).values, source_free(case, "ekfac", absolute_damping=1e-3), 1e-6)
    free = with_rates(in_memory(0.05), 1e12)
    curvature = fit(free.model, free.task, free.rows, precision=Score().precision)
    assert all(bool((block.lam_OI > 1e-9).all()) for block in curvature.blocks.values())
    agree(source(free, segments=1).values, source_free(free, "ekfac", damping=0.0), 1e-6)


def test_few_steps_are_gradient_dot_times_the_sum_of_the_rates():
    case = with_rates(in_memory(0.05), 1e-9)
    dot = case.m_QP @ case.g_NP.T / len(case.rows)
    agree(source(case, segments=1).values, 6e-9 * dot, 1e-6)


def source_free(case, method, **given):
    return attribute(method, case.model, case.task, case.queries, case.rows, **given).values


def test_what_has_caught_up():
    x = torch.tensor([0.0, 1e-30, 1e-9, 1.0, 50.0, 1e12], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 1 - 5e-10, 1 - np.exp(-1.0), 0.02, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(caught_up(x), expected, rtol=1e-12, atol=0)


def test_the_mean_of_curvatures_is_the_diagonal_of_the_mean_in_its_bases():
    case = trained("sgd")
    one, two = (fit(at.model, case.task, ROWS, modules=MODULES) for _, at in list(case.at_checkpoints())[:2])
    assert mean_curvature([one]) is one.operator
    same, mean = mean_curvature([one, one]), mean_curvature([one, two])
    for name, block in mean.blocks.items():
        agree(same.blocks[name].dense(), one.blocks[name].dense(), 1e-9)
        q = torch.kron(block.q_O.dense(), block.q_I.dense())
        expected = (one.blocks[name].dense() + two.blocks[name].dense()) / 2
        agree(block.lam_OI.flatten(), (q.T @ expected @ q).diag(), 1e-9)
        whole = torch.linalg.matrix_norm(expected)
        assert torch.linalg.matrix_norm(block.dense() - expected) < 0.5 * whole
    assert "mean of 2" in mean.label


def test_a_killed_run_resumes(tmp_path):
    case = trained("sgd")
    seen = killed_and_resumed(lambda out: source(case, out=out), tmp_path, "score", 2, at="end")
    assert len(seen.resumed["score"]) == 2 and "covariance" not in seen.resumed, "nothing that was finished is done again"


def test_several_processes_give_the_same(tmp_path):
    case = trained("adamw_torch")
    expected = source(replace(case, training=read_training(folder("adamw_torch"))), segments=2).values
    for found in run(work.unrolled, folder("adamw_torch"), QUERIES, ROWS, tmp_path / "two"):
        agree(found, expected, 1e-6)


def test_what_is_missing_is_said():
    case = trained("sgd")
    with pytest.raises(UsageError, match="No checkpoint of the training was kept"):
        source(replace(case, training=replace(case.training, checkpoints=[])))
    about = {**case.training.about, "optimizer": {"name": "Adafactor"}}
    with pytest.raises(UsageError, match="how the training's optimizer moved"):
        source(replace(case, training=replace(case.training, about=about)))
