"""The damping of a training is one over the sum of its rates, in the units of its loss and the metric of its optimizer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from inverses import found, trained
from oracle import agree

from benchmarks.oracles.curvature import ORACLES, damping_P, solved
from whence.engine.point import Point
from whence.errors import UsageError
from whence.fitting import fit
from whence.methods.base import Request
from whence.methods.damping import damping_of_training, stopped_early
from whence.tasks import Regression
from whence.validate.trainer import Recipe, recorded

SGD = {"optimizer": "sgd", "momentum": 0.5}


def request(case):
    return Request(Point(case.model, case.task, case.rows), case.queries, training=case.training)


def test_sum_of_rates():
    assert stopped_early([0.1, 0.3]) == pytest.approx(1 / 0.4)
    assert stopped_early([0.1, 0.3], weight_decay=0.5, momentum=0.9) == pytest.approx(1 / 4 + 0.5)


def test_it_is_what_gradient_descent_that_stops_leaves_unfitted():
    """Along each direction of curvature h: `(1 - e^(-T h)) / h` against `1 / (h + 1 / T)`."""
    rates, h = np.full(4000, 0.05), np.geomspace(1e-6, 10, 200)
    unrolled = (1 - np.prod(1 - rates[:, None] * h, axis=0)) / h
    ratio = unrolled * (h + stopped_early(rates))
    assert ratio.min() > 0.99 and 1.29 < ratio.max() < 1.3


def test_sgd_is_damped_by_a_number_of_nats_per_row():
    case = trained(**SGD)
    damping = damping_of_training(request(case))
    tokens = case.training.about["tokens"]["in_loss_per_epoch"] / len(case.rows)
    assert tokens > 2 and damping.metric is None
    least = tokens * ((1 - 0.5) / case.training.learning_rates.sum() + 0.01)
    norms = [row["grad_norm"] for row in case.training.metrics if row["grad_norm"]]
    assert max(norms) > 1, "some steps are clipped"
    assert damping.factor == pytest.approx(least / np.mean([min(1, 1 / norm) for norm in norms])) and damping.factor > least
    for method in ("gauss-newton", "cg", "arnoldi", "ekfac"):
        exactly = {"tolerance": 1e-9} if method == "cg" else {}
        scores = found(method, case, damping="training", **exactly)
        agree(scores.values, found(method, case, absolute_damping=damping.factor, **exactly).values, 1e-9)
        if method in ORACLES and method != "arnoldi":
            agree(scores.values, ORACLES[method](case, damping="training"), 1e-7)


def test_adam_is_damped_in_its_metric():
    case = trained()
    damping = damping_of_training(request(case))
    assert damping.metric is not None and "transformer.h.0.mlp.c_fc" in damping.metric.blocks
    numbers = torch.cat([block.lam_OI.flatten() for block in damping.metric.blocks.values()])
    agree(damping.factor * numbers.sort().values, damping_P(case, "training", None, 0.0).sort().values, 1e-12)
    assert numbers.max() > 10 * numbers.min()


def test_a_diagonal_curvature_is_damped_so_exactly():
    case = trained()
    squares = (case.g_NP**2).mean(0)
    factors = fit(case.model, case.task, case.rows, method="diagonal", labels="data", examples="all")
    agree(
        found("diagonal", case, factors=factors, damping="training").values,
        solved(case, squares.diag(), damping_P(case, "training", None, 0.0)),
        1e-9,
    )


def test_ekfac_takes_the_metric_on_the_diagonal_of_its_bases():
    case = trained()
    damping, curvature = damping_of_training(request(case)), request(case).curvature()
    inverse = damping.inverse(curvature).dense()
    for name, block in curvature.blocks.items():
        q = torch.kron(block.q_O.dense(), block.q_I.dense())
        metric = damping.factor * damping.metric.blocks[name].lam_OI.flatten()
        within = (q.T @ (metric[:, None] * q)).diag()
        agree(inverse[name], q @ torch.diag(1 / (block.lam_OI.flatten() + within)) @ q.T, 1e-9)


def test_what_is_missing_is_said(monkeypatch):
    case = trained()
    with pytest.raises(UsageError, match="needs the training"):
        found("ekfac", replace(case, training=None), damping="training")
    about = {**case.training.about, "optimizer": {"name": "Adafactor"}}
    with pytest.raises(UsageError, match="how the training's optimizer moved"):
        found("cg", replace(case, training=replace(case.training, about=about)), damping="training")
    with pytest.raises(UsageError, match="second moments are missing"):
        found("cg", replace(case, training=replace(case.training, checkpoints=[])), damping="training")
    with pytest.raises(UsageError, match="damping can't be"):
        found("ekfac", case, damping="trained")


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_training_in_memory_damps_as_one_in_a_folder(optimizer):
    """Its loss is a mean over rows, so that nothing is scaled."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(3, generator=generator), torch.randn(1, generator=generator)) for _ in range(8)]
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    recipe = Recipe(0.1, 2, 4, optimizer, weight_decay=0.5, momentum=0.9)
    training = recorded(model, Regression(), rows, recipe, checkpoints=[4], progress="")
    damping = damping_of_training(Request(Point(model, Regression(), rows), rows, training=training))
    assert damping.factor == pytest.approx((0.1 if optimizer == "momentum" else 1) / 0.4 + 0.5)
    if optimizer == "adamw":
        moments = training.checkpoints[-1].second_moments()
        expected = torch.cat([moments["0.weight"], moments["0.bias"][:, None]], 1) / (1 - 0.999**4)
        agree(damping.metric.blocks["0"].lam_OI, expected.sqrt() + 1e-8, 1e-6)
        assert damping.mean == pytest.approx(
            3 * float(torch.cat([each.flatten() for each in moments.values()]).div(1 - 0.999**4).sqrt().mean()), rel=1e-4
        )
    else:
        assert damping.metric is None and damping.mean == damping.factor
