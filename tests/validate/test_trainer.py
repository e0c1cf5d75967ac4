import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.models import CASES, tokenizer
from whence.errors import UsageError
from whence.tasks import CausalLM, Classification, Regression
from whence.validate.trainer import Recipe, Replicas, data_order, fresh, recorded, retrain

RATE = {"sgd": 0.1, "momentum": 0.05, "adamw": 0.01}


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def rows(count=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator, dtype=dtype)
    return [(x[i], x[i, :1].sin() + x[i, 1:2]) for i in range(count)]


def recipe(optimizer="sgd", **changes):
    given = {"epochs": 3, "batch_size": 4, "weight_decay": 0.03, "schedule": "cosine", "order_seed": 5}
    return Recipe(RATE[optimizer], **{**given, "optimizer": optimizer, **changes})


def ordinary(model, data, chosen, weights):
    """The loop that anyone would write with torch.optim."""
    optimizers = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), weight_decay=chosen.weight_decay),
        "momentum": lambda: torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=chosen.weight_decay),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), weight_decay=chosen.weight_decay, foreach=False),
    }
    optimizer, steps = optimizers[chosen.optimizer](), chosen.steps(len(data))
    for step, batch in enumerate(data_order(range(len(data)), chosen, chosen.order_seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step, steps)
        x, y = (torch.stack([data[i][side] for i in batch]) for side in (0, 1))
        loss = ((model(x) - y).square().sum(1) / 2 * weights[batch]).sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("optimizer", RATE)
def test_a_replica_is_what_an_ordinary_loop_trains(optimizer):
    weights = np.random.default_rng(0).uniform(0, 2, (3, 13))
    found = retrain(mlp(), Regression(), rows(), recipe(optimizer), weights, start="given")
    for k in range(3):
        expected = ordinary(mlp(), rows(), recipe(optimizer), torch.from_numpy(weights[k]))
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(found.parameters[name][k], parameter.detach(), rtol=1e-12, atol=1e-14)


def test_alone_and_in_single_precision_the_bits_are_the_ordinary_loops():
    data = rows(dtype=torch.float32)
    found = retrain(mlp(torch.float32), Regression(), data, recipe("adamw"), np.ones((1, 13)), start="given")
    expected = ordinary(mlp(torch.float32), data, recipe("adamw"), torch.ones(13))
    assert all(found.parameters[name][0].equal(own) for name, own in expected.named_parameters())


def test_the_same_call_gives_the_same_bits_whatever_the_global_seed_and_the_threads():
    weights = np.ones((5, 13))
    first = retrain(mlp(), Regression(), rows(), recipe(), weights, seeds=range(5))
    torch.manual_seed(99)
    torch.set_num_threads(2)
    second = retrain(mlp(), Regression(), rows(), recipe(), weights, seeds=range(5))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert all(first.parameters[name].equal(second.parameters[name]) for name in first.parameters)
    assert not first.parameters["0.weight"][0].equal(first.parameters["0.weight"][1])  # other seeds, other weights


def test_a_weight_of_zero_removes_a_row_and_nothing_else_changes():
    """Against training with the row's target replaced by anything: what it says has no effect, its place stays."""
    weights = np.ones((1, 13))
    weights[0, 4] = 0
    spoilt = rows()
    spoilt[4] = (spoilt[4][0] * 50, spoilt[4][1] - 100)
    kept = retrain(mlp(), Regression(), rows(), recipe(), weights)
    assert all(
        kept.parameters[name].equal(own)
        for name, own in retrain(mlp(), Regression(), spoilt, recipe(), weights).parameters.items()
    )
    whole = retrain(mlp(), Regression(), rows(), recipe())
    assert (kept.losses(rows()) - whole.losses(rows())).abs().max() > 1e-4


def test_together_or_one_after_the_other():
    case = CASES["llama"]
    weights = np.random.default_rng(0).uniform(0, 1, (3, 10))
    chosen = recipe("adamw", epochs=2)
    one, all_ = (retrain(case.model(), case.task(), case.train(), chosen, weights, start="given", together=n) for n in (1, 3))
    for name in one.parameters:
        torch.testing.assert_close(one.parameters[name], all_.parameters[name], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.losses(case.train()), all_.losses(case.train()))


def test_losses_and_measurements_are_the_tasks():
    case = CASES["llama"]
    replicas = retrain(case.model(), case.task(), case.train(), recipe(), seeds=[0, 1], start="given", order_seeds=[0, 1])
    queries = [*case.queries(), {"prompt": "w1 w2", "completion": " w3", "contrast": " w4"}]
    losses, measured = replicas.losses(case.train()), replicas.measurements(queries)
    assert losses.shape == (2, 10) and measured.shape == (2, 4)
    for k in range(2):
        model, task = replicas.copy_of(k), case.task()
        with torch.no_grad():
            expected = [task.losses(model, task.collate([item])).item() for item in task.encode(case.train())]
            asked = [
                sum(weight * task.measurements(model, task.collate([item])).item() for item, weight in query)
                for query in task.encode_queries(queries)
            ]
        torch.testing.assert_close(losses[k], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(measured[k], torch.tensor(asked, dtype=torch.float64))


def test_orders_differ_by_replica_and_come_back_in_their_places():
    found = retrain(mlp(), Regression(), rows(), recipe(), order_seeds=[7, 3, 7, 5])
    alone = [retrain(mlp(), Regression(), rows(), recipe(order_seed=seed)) for seed in (7, 3, 7, 5)]
    for name, stacked in found.parameters.items():
        torch.testing.assert_close(stacked, torch.cat([one.parameters[name] for one in alone]), rtol=1e-12, atol=1e-14)
    assert not found.parameters["0.weight"][0].equal(found.parameters["0.weight"][1])


def test_checkpoints_in_memory_and_on_disk(tmp_path):
    model = mlp()
    found = retrain(model, Regression(), rows(), recipe(schedule="constant"), checkpoints=[4])
    half = retrain(model, Regression(), rows(), recipe(schedule="constant", epochs=1))
    assert all(found.checkpoints[4][name].equal(own) for name, own in half.parameters.items())
    file = found.save(tmp_path / "replicas.safetensors")
    again = Replicas.open(file, model, Regression())
    assert all(again.parameters[name].equal(own) for name, own in found.parameters.items())
    with pytest.raises(UsageError, match="another model"):
        Replicas.open(file, nn.Linear(3, 1), Regression())
    with pytest.raises(UsageError, match="no such step"):
        retrain(model, Regression(), rows(), recipe(), checkpoints=[400])


def test_the_users_model_is_as_it_was():
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    retrain(model, Regression(), rows(), recipe(), start="given")
    assert model.training
    assert all(before[name].equal(own) for name, own in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("part", [nn.Dropout(0.1), nn.BatchNorm1d(6), nn.LSTM(6, 6, 2, dropout=0.1)])
def test_dropout_and_batch_statistics_are_refused(part):
    with pytest.raises(UsageError, match=r"dropout|Batch statistics"):
        retrain(nn.Sequential(nn.Linear(3, 6), part), Classification(), rows(), recipe())
    retrain(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.0)).double(), Regression(), rows(), recipe())


def test_dropout_in_a_hugging_face_model_is_refused():
    case = CASES["llama"].build
    model = case(attention_dropout=0.1)
    with pytest.raises(UsageError, match="dropout"):
        retrain(model, CausalLM(tokenizer()), CASES["llama"].train(), recipe())


def test_fresh_weights_are_those_of_the_seed():
    for model in (mlp(), CASES["llama"].model()):
        one, same, other = fresh(model, 1), fresh(model, 1), fresh(model, 2)
        first = next(iter(dict(model.named_parameters())))
        assert one.get_parameter(first).equal(same.get_parameter(first))
        assert not one.get_parameter(first).equal(other.get_parameter(first))
        assert one.get_parameter(first).dtype == torch.float64

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(UsageError, match="reset_parameters"):
        fresh(Odd(), 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights_KN": np.ones((2, 12))}, "one finite number"),
        ({"weights_KN": np.full((2, 13), np.nan)}, "one finite number"),
        ({"weights_KN": np.ones((2, 13)), "seeds": [1, 2, 3]}, "different numbers"),
    ],
)
def test_wrong_weights_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        retrain(mlp(), Regression(), rows(), recipe(), **given)


def test_wrong_recipes_are_refused():
    with pytest.raises(UsageError, match="optimizer"):
        recipe(optimizer="sgd").__class__(0.1, 1, 1, "adam")
    with pytest.raises(UsageError, match="above zero"):
        Recipe(0.1, 0, 4)


def test_copies_begin_where_another_training_ended_and_a_frozen_part_stays():
    weights = np.random.default_rng(0).uniform(0, 2, (3, 13))
    before = retrain(mlp(), Regression(), rows(), recipe("momentum"), weights)
    model = mlp()
    model[0].requires_grad_(False)
    second = rows(9)
    found = retrain(model, Regression(), second, recipe(), start=before.parameters, seeds=[0] * 3, order_seeds=[5] * 3)
    for k in range(3):
        expected = before.copy_of(k)
        expected[0].requires_grad_(False)
        ordinary(expected, second, recipe(), torch.ones(9))
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(found.parameters[name][k], parameter.detach(), rtol=1e-12, atol=1e-14)
            assert found.parameters[name][k].equal(before.parameters[name][k]) == name.startswith("0.")
    told = recorded(model, Regression(), second, recipe(), start="given", checkpoints=[4])
    assert set(told.how.start) == {"2.weight", "2.bias"} == set(told.checkpoints[0].weights)


def test_a_warm_up_rises_over_the_first_tenth_and_ends_as_the_cosine_does():
    warm, plain = recipe(schedule="warm-up"), recipe()
    rates = [warm.rate(step, 40) / warm.learning_rate for step in range(41)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1]) and rates[40] == pytest.approx(plain.rate(40, 40)) == 0
    assert all(later < before for before, later in zip(rates[4:], rates[5:], strict=False))
