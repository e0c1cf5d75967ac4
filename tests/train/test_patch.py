"""A step more on some rows is that of torch's own optimizer, and is taken where a training can't be repeated."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import texts, tokenizer
from oracle import agree
from torch import nn
from trainings import trained

from whence.data import as_rows
from whence.engine.point import Point
from whence.engine.queries import encode_queries
from whence.engine.stream import encode
from whence.errors import StaleArtifact, UsageError
from whence.models import load_model
from whence.tasks import CausalLM
from whence.train.patch import patch
from whence.train.record import read_training
from whence.train.retrain import retrain

ROWS, TASK = as_rows(texts(7, seed=1)), CausalLM(tokenizer())
SETTINGS = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 2, "evaluation": 0, "save_steps": 3, "keep": None}
WAYS = {
    "adamw": {"weight_decay": 0.1, "max_grad_norm": 0.5},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "arguments": {"optim_args": "momentum=0.9"}},
    "lora": {"lora": {"r": 2, "dropout": 0.1, "targets": "all-linear"}, "learning_rate": 0.05},
}
SETS = [[1, 4], [2], [0, 3, 5]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("patch"), ROWS, SETTINGS, WAYS)


def asked(folder):
    training = read_training(folder)
    model = load_model(training.model)[0]
    queries = encode_queries(TASK, as_rows(texts(6, seed=2)[::2]), model)
    return training, Point(model, TASK, ROWS), queries


def by_torch(training, point, rows, steps):
    """The model after the steps, with torch's own optimizer in the state that the training left but for its momentum."""
    model, descent = load_model(training.model)[0].eval(), training.descent()
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    decay = {name: 0.0 if name in descent.undecayed else descent.weight_decay for name in named}
    groups = [{"params": [weight], "weight_decay": decay[name]} for name, weight in named.items()]
    rates = training.learning_rates
    rule, rate = descent.optimizer, rates[len(rates) // 2 :].mean()  # of two epochs the last
    if rule.kind == "adamw":
        optimizer: Any = torch.optim.AdamW(groups, lr=rate, betas=rule.betas, eps=rule.eps)
        for name, moment in training.checkpoints[-1].second_moments().items():
            state = {"step": torch.tensor(float(len(training.steps))), "exp_avg": torch.zeros_like(moment)}
            optimizer.state[named[name]] = {**state, "exp_avg_sq": moment.clone()}
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=rule.momentum)
    items = [point.examples.items[row] for row in rows]
    for _ in range(steps):
        optimizer.zero_grad()
        (TASK.losses(model, TASK.collate(items)).sum() / sum(map(TASK.predictions, items))).backward()
        if rule.clip:
            torch.nn.utils.clip_grad_norm_(list(named.values()), rule.clip)
        optimizer.step()
    return model


def measures(model, query):
    with torch.no_grad():
        return sum(-weight * float(TASK.losses(model, TASK.collate([item]))) for item, weight in query)


@pytest.mark.parametrize(("way", "steps"), [("adamw", 1), ("adamw", 3), ("sgd", 2), ("lora", 1)])
def test_it_is_a_step_of_the_trainings_optimizer(base, way, steps):
    training, point, queries = asked(base / way)
    held_out = encode(TASK, as_rows(texts(3, seed=4)), point.model)
    found = patch(training, SETS, point, queries, steps=steps, held_out=held_out)
    assert found.repeated is None and found.measured.shape == (3, 3)
    agree(found.whole[:-1], np.array([measures(point.model, query) for query in queries.weighted]), 1e-5)
    for rows, measured_Q, held in zip(SETS, found.measured, found.held_out, strict=True):
        model = by_torch(training, point, rows, steps)
        agree(measured_Q, np.array([measures(model, query) for query in queries.weighted]), 1e-5)
        losses = sum(-measures(model, [(item, 1.0)]) for item in held_out.items)
        assert held == pytest.approx(losses / sum(map(TASK.predictions, held_out.items)), rel=1e-5)
    assert np.abs(found.falls).min() > 1e-5, "something moves"


def test_dropout_and_short_formats_are_no_obstacle(base):
    training, point, queries = asked(base / "lora")
    with pytest.raises(UsageError, match="dropout"):
        retrain(training, np.ones(7), point, queries)
    assert any(isinstance(module, nn.Dropout) and module.p for module in point.model.modules())
    short = Point(load_model(training.model, dtype="bfloat16")[0], TASK, ROWS)
    agree(patch(training, SETS, short, queries).falls, patch(training, SETS, point, queries).falls, 0.1)


def test_without_second_moments_it_is_refused(base, monkeypatch):
    training, point, queries = asked(base / "adamw")
    for given, said in (([], "no checkpoint"), ([replace(training.checkpoints[-1], path=base)], "without")):
        with pytest.raises(UsageError, match="How far AdamW's next step") as raised:
            patch(replace(training, checkpoints=given), SETS, point, queries)
        assert said in raised.value.given


def test_it_resumes_and_refuses_other_sets(base, tmp_path):
    training, point, queries = asked(base / "adamw")
    made = patch(training, SETS, point, queries, out=tmp_path / "kept")
    again = patch(training, SETS, point, queries, out=tmp_path / "kept")
    np.testing.assert_array_equal(made.measured, again.measured)
    np.testing.assert_array_equal(made.whole, again.whole)
    with pytest.raises(StaleArtifact, match="sets"):
        patch(training, SETS[:2], point, queries, out=tmp_path / "kept")
