import pytest
import torch
from torch import nn

from whence.engine.stream import encode
from whence.errors import UsageError
from whence.tasks import Classification, Regression
from whence.tasks.regression import signs


@pytest.mark.parametrize("outputs", [1, 3])
def test_half_the_squared_error(outputs):
    model, task = nn.Linear(2, outputs).double(), Regression()
    items = [(torch.randn(2, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)) for _ in range(4)]
    batch = task.collate(items)
    expected = torch.stack([(model(x) - y).square().sum() / 2 for x, y in items])
    torch.testing.assert_close(task.losses(model, batch), expected)
    torch.testing.assert_close(task.measurements(model, batch), -expected)
    assert task.noise_shape(items[0]) == (outputs,)


def test_scalar_targets_meet_columns_of_predictions():
    model, task = nn.Linear(2, 1), Regression()
    items = [(torch.randn(2), 0.5), (torch.randn(2), -1.0)]
    batch = task.collate(items)
    expected = torch.stack([(model(x)[0] - y) ** 2 / 2 for x, y in items])
    torch.testing.assert_close(task.losses(model, batch), expected)
    assert task.noise_shape(items[0]) == ()
    mapping = task.collate([{"input": x, "labels": y} for x, y in items])
    torch.testing.assert_close(task.losses(model, mapping), expected)
    flat = Regression().losses(lambda x: model(x)[:, 0], batch)
    torch.testing.assert_close(flat, expected)


def test_draws_are_one_above_or_below_the_prediction():
    draws = 20_000
    model, task = nn.Linear(2, 1).double(), Regression()
    batch = {"inputs": torch.ones(draws, 2, dtype=torch.float64), "targets": torch.full((draws,), 99.0)}
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    losses = task.losses(model, batch, noise)
    torch.testing.assert_close(losses, torch.full((draws,), 0.5, dtype=torch.float64))
    residuals = torch.autograd.grad(losses.sum(), model.bias)[0] / draws
    assert abs(residuals.item()) < 4.5 / draws**0.5
    assert signs(torch.tensor([0.0, 1 - 2**-24])).tolist() == [-1, 1]


def test_squared_gradients_of_one_output_are_those_of_the_gauss_newton_matrix():
    """Whatever is drawn: so that eigenvalues corrected with them have no noise."""
    model, task = nn.Linear(3, 1).double(), Regression()
    inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = {"inputs": inputs, "targets": torch.zeros(5)}
    for seed in range(3):
        noise = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        for row, loss in enumerate(task.losses(model, batch, noise)):
            (gradient,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
            torch.testing.assert_close(gradient.square()[0], inputs[row].square())


def test_own_measurement():
    task = Regression(measurement=lambda model, batch: batch["targets"])
    assert task.measurements(nn.Identity(), {"targets": torch.tensor([2.0])}).tolist() == [2.0]
    assert task.settings()["measurement"].endswith("<lambda>")
    assert Regression().settings() == {"task": "Regression", "measurement": "logprob"}


@pytest.mark.parametrize(
    ("outputs", "target"),
    [((1,), torch.zeros(2)), ((2,), 0.5), ((2, 3), torch.zeros(3, 2)), ((2, 3), torch.zeros(6)), ((1,), "high")],
)
def test_targets_of_another_shape_are_refused(outputs, target):
    """Six numbers fit in 2 x 3 and in 3 x 2, in another order."""
    task = Regression()
    batch = task.collate([(torch.zeros(2), target)] * 3)
    with pytest.raises(UsageError, match="not of the predictions' shape"):
        task.losses(lambda x: torch.zeros(len(x), *outputs), batch)


@pytest.mark.parametrize("task", [Regression(), Classification()])
def test_parts_of_examples_that_no_loss_reads_are_named(task, notes):
    weighted = [(torch.zeros(2), torch.tensor(1), 0.5)] * 2
    encode(task, weighted, nn.Linear(2, 3))
    assert notes == ["warning: examples have 3 parts, and the loss reads the first two, input and target"]
    encode(task, [row[:2] for row in weighted], nn.Linear(2, 3))
    assert len(notes) == 1
