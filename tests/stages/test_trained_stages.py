"""Through a training that was recorded: learning rates, loss scale, momentum, weight decay and Adam's metric are its own."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import gpt2, randomised, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.unrolled import spread
from whence.data import as_rows
from whence.engine.point import Point
from whence.errors import UsageError
from whence.models import load_model
from whence.settings import Train
from whence.stages import Stage, multistage
from whence.stages.multistage import form
from whence.stages.transport import course_of
from whence.tasks import CausalLM
from whence.train.checkpoints import MOMENTS
from whence.train.finetune import finetune
from whence.train.record import read_training
from whence.train.state import OPTIMIZER, read_state

FOLDER = tempfile.TemporaryDirectory()
BASE_ROWS, ROWS, QUERIES = (as_rows(texts(count, seed)) for count, seed in ((8, 5), (12, 1), (3, 2)))


@functools.cache
def trained(optimizer):
    """The record of a fine-tuning, all of whose steps were clipped a little, and both cases."""
    how = {"adamw_torch": {"arguments": {}}, "sgd": {"arguments": {"optim_args": "momentum=0.5"}}}[optimizer]
    settings = {"learning_rate": 1e-2, "max_steps": 6, "batch_size": 4, "save_steps": 3, "log_steps": 1, "keep": 2}
    settings = Train(**{**settings, **how, "evaluation": 0, "optimizer": optimizer, "weight_decay": 0.1})
    torch.manual_seed(0)
    base, task = randomised(gpt2()).eval(), CausalLM(tokenizer())
    first = Case(base.double(), task, BASE_ROWS, QUERIES)
    torch.manual_seed(0)
    finetune(randomised(gpt2()).eval(), task, ROWS, settings, out=Path(FOLDER.name) / optimizer, seed=0)
    training = read_training(Path(FOLDER.name) / optimizer)
    return first, Case(load_model(training.model)[0].double(), task, ROWS, QUERIES, training)


@functools.cache
def points(optimizer):
    return [Point(case.model, case.task, case.rows) for case in trained(optimizer)]


@functools.cache
def formed(optimizer):
    """The curvature of each stage; where training was a proximal step it is left to `multistage`."""
    return [form(Stage(name, point), "gauss-newton") for name, point in zip("ab", points(optimizer), strict=True)]


def stages(optimizer, **how):
    base, tuned = points(optimizer)
    curvatures = formed(optimizer) if how.get("transport") == "flow" else ["gauss-newton"] * 2
    return [
        Stage("base", base, curvature=curvatures[0], absolute_damping=0.05),
        Stage("tuned", tuned, curvature=curvatures[1], training=trained(optimizer)[1].training, damping="training", **how),
    ]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("transport", ["flow", "proximal"])
def test_transport_through_a_training(optimizer, transport):
    """`D` is what steps are divided by, `x = T G D^-1 / s + T w`: `e^-x` or `1 / (1 + x)` of a gradient at the end."""
    first, second = trained(optimizer)
    training, size = second.training, second.problem.size
    momentum, eye_PP = 0.5 if optimizer == "sgd" else 0.0, torch.eye(size).double()
    time = float(training.learning_rates.sum()) / (1 - momentum)
    d_P = spread(second, training.checkpoints[-1]) if optimizer == "adamw_torch" else torch.ones(size).double()
    x_PP = time * (second.gauss_newton_PP / d_P / training.loss_scale + 0.1 * eye_PP)
    through_PP = torch.matrix_exp(-x_PP) if transport == "flow" else torch.linalg.inv(eye_PP + x_PP)
    v_QP = second.m_QP @ through_PP.T @ torch.linalg.inv(first.gauss_newton_PP + 0.05 * eye_PP)
    found = multistage(stages(optimizer, transport=transport), QUERIES)
    agree(found.stages["base"].values, v_QP @ first.g_NP.T / len(BASE_ROWS), 1e-6)
    damped_PP = second.gauss_newton_PP + training.loss_scale * (1 / time + 0.1) * torch.diag(d_P)
    agree(found.stages["tuned"].values, second.m_QP @ torch.linalg.solve(damped_PP, second.g_NP.T) / len(ROWS), 1e-6)
    assert ("metric of Adam" in found.about["tuned"]["transport"]) == (optimizer == "adamw_torch")


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_checkpoint_of_the_trainer_tells_the_same(optimizer):
    _, second = trained(optimizer)
    point = Point(second.model, second.task, ROWS)
    folder = second.training.checkpoints[-1].path
    found = read_state(folder, point)
    np.testing.assert_allclose(found.learning_rates, second.training.learning_rates, rtol=1e-12)
    assert found.loss_scale == pytest.approx(second.training.loss_scale, rel=1e-9)
    own, told = second.training.descent(), found.descent()
    assert (told.optimizer, told.weight_decay) == (replace(own.optimizer, betas=told.optimizer.betas), own.weight_decay)
    assert set(told.undecayed) == set(own.undecayed)
    moments = second.training.checkpoints[-1].second_moments()
    assert moments.keys() == found.checkpoints[0].second_moments().keys() and bool(moments) == (folder / MOMENTS).exists()
    for name, moment in found.checkpoints[0].second_moments().items():
        torch.testing.assert_close(moment, moments[name], rtol=0, atol=0)
    with pytest.raises(UsageError, match="which rows each step read"):
        found.replay()


def test_rates_between_logged_steps_lie_between_and_what_is_missing_is_said(tmp_path):
    _, second = trained("adamw_torch")
    point = Point(second.model, second.task, ROWS)
    (tmp_path / "trainer_state.json").write_text(
        '{"global_step": 5, "log_history": [{"step": 2, "learning_rate": 0.4}, {"step": 4, "learning_rate": 0.2}, {"step": 5}]}'
    )
    found = read_state(tmp_path, point)
    np.testing.assert_allclose(found.learning_rates, [0.4, 0.4, 0.3, 0.2, 0.2])
    assert not (tmp_path / OPTIMIZER).exists()
    with pytest.raises(UsageError, match="not known how the training's optimizer moved"):
        multistage([stages("adamw_torch")[0], Stage("tuned", point, training=found, curvature="gauss-newton")], QUERIES)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5, "log_history": []}')
    with pytest.raises(UsageError, match="tells no learning rate"):
        read_state(tmp_path / "trainer_state.json", point)
    with pytest.raises(UsageError, match="no trainer_state.json"):
        read_state(tmp_path / "elsewhere", point)


def test_rates_alone_are_of_steps_along_the_loss_of_a_token():
    tokens = trained("sgd")[1].training.about["tokens"]["in_loss_per_epoch"]
    course = course_of(Stage("tuned", points("sgd")[1], rates=3.0), ())
    assert (course.rates, course.loss_scale, course.metric) == (3.0, tokens / len(ROWS), None)


def test_a_damping_that_takes_a_training_for_longer_is_remarked_on(notes):
    base, tuned = stages("sgd", transport="flow")
    multistage([base, tuned], QUERIES)
    assert not any("stopped early" in text for text in notes)
    multistage([base, replace(tuned, damping=1e-6)], QUERIES)
    assert sum("tuned stopped early" in text for text in notes) == 1
