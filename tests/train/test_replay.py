"""A recorded training can be repeated, and ends where it ended."""

import numpy as np
import pytest
import torch
from models import CASES, llama, texts, tokenizer
from torch import nn
from trainings import trained

from whence.data import as_rows
from whence.engine.stream import encode
from whence.errors import UsageError
from whence.models import load_model
from whence.tasks import CausalLM, Regression
from whence.train.record import START, read_training
from whence.train.replay import Run
from whence.validate.trainer import Recipe, recorded, retrain

ROWS = as_rows(texts(9, seed=1))
CHOSEN = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 2, "save_steps": 3, "log_steps": 1, "keep": None, "evaluation": 0}


def recorded_one(folder, **changes):
    return read_training(trained(folder, ROWS, CHOSEN, {"train": changes}) / "train")


def replayed(training, dtype=None):
    """The run, and its state after each step, the first one before any."""
    task = CausalLM(tokenizer())
    model = load_model(training.model)[0]
    run = Run(model, task, encode(task, ROWS, model), training.replay(), dtype)
    states = [run.start()]
    for number in range(len(training.steps)):
        states.append(run.step(number, states[-1], run.gradient(number, states[-1][0])))
    return run, model, states


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1, "max_grad_norm": 0.5},
        {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, "gradient_accumulation": 2, "drop_last": False},
        {"optimizer": "sgd", "learning_rate": 0.05, "arguments": {"optim_args": "momentum=0.9"}},
        {"lora": {"r": 2, "dropout": 0.0, "targets": "all-linear"}, "learning_rate": 0.05, "gradient_accumulation": 2},
        {"arguments": {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3}, "schedule": "constant"},
    ],
    ids=["adamw", "sgd", "momentum", "lora", "betas"],
)
def test_a_folder_of_training_is_repeated(tmp_path, changes):
    training = recorded_one(tmp_path, **changes)
    run, model, states = replayed(training)
    own, moved = dict(model.named_parameters()), run.vector(dict(model.named_parameters()))
    went = torch.linalg.vector_norm(moved - states[0][0])
    assert went > 0.05 and torch.linalg.vector_norm(states[-1][0] - moved) < 1e-4 * went
    for checkpoint in training.checkpoints:
        checkpoint.load(model)
        assert torch.linalg.vector_norm(states[checkpoint.step][0] - run.vector(dict(model.named_parameters()))) < 1e-4 * went
        for name, moment in checkpoint.second_moments().items():
            torch.testing.assert_close(run.named(states[checkpoint.step][2])[name], moment, rtol=1e-3, atol=1e-9)
    assert set(training.replay().start) <= set(own)


def test_what_is_not_recorded_or_not_repeated_alike_is_refused(tmp_path):
    training = recorded_one(tmp_path / "lora", lora={"r": 2, "dropout": 0.1, "targets": "all-linear"})
    with pytest.raises(UsageError, match="dropout"):
        replayed(training)
    for changes, given in (
        ({"optimizer": "adafactor"}, "Adafactor"),
        ({"optimizer": "sgd", "arguments": {"optim_args": "momentum=0.9,nesterov=true"}}, "SGD with nesterov"),
    ):
        with pytest.raises(UsageError, match="how the training's optimizer moved") as raised:
            recorded_one(tmp_path / given, **changes).replay()
        assert raised.value.given == given
    (tmp_path / "lora" / "train" / f"{START}.safetensors").unlink()
    with pytest.raises(UsageError, match="can't be repeated") as raised:
        training.replay()
    assert "the weights it began with are not kept" in raised.value.given


def test_other_rows_and_other_models_are_refused(tmp_path):
    training, task = recorded_one(tmp_path), CausalLM(tokenizer())
    model = load_model(training.model)[0]
    with pytest.raises(UsageError, match="not among the rows") as raised:
        Run(model, task, encode(task, ROWS.take(range(5)), model), training.replay())
    assert "rows.jsonl" in raised.value.fix
    with pytest.raises(UsageError, match="another model"):
        Run(llama(tie_word_embeddings=True).resize_token_embeddings(4), task, encode(task, ROWS), training.replay())


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_a_training_in_memory_is_that_of_retrain(optimizer):
    x = np.random.default_rng(0).normal(size=(13, 4))
    rows = [(torch.tensor(each[:3]), torch.tensor(each[3:])) for each in x]
    recipe = Recipe(0.05, 2, 4, optimizer, weight_decay=0.1, schedule="cosine", order_seed=3)
    replicas = retrain(perceptron(), Regression(), rows, recipe, checkpoints=[3])
    training = recorded(perceptron(), Regression(), rows, recipe, checkpoints=[3, 8])
    assert [each.step for each in training.checkpoints] == [3, 8] == [3, recipe.steps(13)]
    for kept, expected in zip(training.checkpoints, (replicas.checkpoints[3], replicas.parameters), strict=True):
        model = perceptron()
        kept.load(model)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), expected[name][0])
        assert set(kept.second_moments()) == (set(expected) if optimizer == "adamw" else set())
    assert training.identity() == recorded(perceptron(), Regression(), rows, recipe, checkpoints=[3, 8]).identity()
    again = recorded(perceptron(), Regression(), rows, Recipe(0.05, 2, 4, optimizer), checkpoints=[3, 8])
    assert training.identity() != again.identity()


def test_a_text_model_of_the_banks_is_repeated():
    case, recipe = CASES["llama"], Recipe(0.01, 2, 4, "adamw")
    replicas = retrain(case.model(), case.task(), case.train(), recipe, start="given")
    training = recorded(case.model(), case.task(), case.train(), recipe, start="given", checkpoints=[recipe.steps(10)])
    for name, weight in training.checkpoints[-1].weights.items():
        torch.testing.assert_close(weight, replicas.parameters[name][0])
