import math

import pytest
import torch

from whence.errors import UsageError
from whence.tasks.base import sample_classes
from whence.tasks.measurements import NAMED, check_measurement, draw_labels, log_odds, measurement_name, negative_log_likelihood

logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
labels = torch.tensor([[1, 2, -100, 6], [-100, -100, -100, 0], [3, 3, 3, 3]])


def by_hand(number):
    """Sum `number(probability of the label)` over the labels of each row."""
    probabilities = logits.softmax(-1)
    return [
        sum(number(probabilities[b, t, label].item()) for t, label in enumerate(row) if label != -100)
        for b, row in enumerate(labels.tolist())
    ]


def test_named_measurements():
    expected = {"logprob": math.log, "loss": lambda p: -math.log(p), "margin": lambda p: math.log(p / (1 - p))}
    assert expected.keys() == NAMED.keys()
    for name, number in expected.items():
        torch.testing.assert_close(NAMED[name](logits, labels), torch.tensor(by_hand(number), dtype=torch.float64))


def test_low_precision_is_raised():
    low = logits.bfloat16()
    for measure in NAMED.values():
        result = measure(low, labels)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, measure(low.double(), labels).float())


def test_margin_has_a_gradient_where_there_is_no_label():
    raw = logits.clone().requires_grad_()
    NAMED["margin"](raw, labels).sum().backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[labels == -100] == 0).all()


def test_draws_follow_the_softmax():
    draws = 40_000
    noise = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row in (logits[0, 0], logits[1, 2].bfloat16(), torch.zeros(7)):
        probabilities = row.double().softmax(-1)
        drawn = draw_labels(row.expand(1, draws, 7), torch.zeros(1, draws, dtype=torch.int64), noise[None])[0]
        share = drawn.bincount(minlength=7) / draws
        assert ((share - probabilities).abs() < 4.5 * (probabilities * (1 - probabilities) / draws).sqrt() + 1e-9).all()


def test_draws_keep_what_is_not_in_the_loss():
    drawn = draw_labels(logits, labels, torch.rand(3, 4))
    assert ((drawn == -100) == (labels == -100)).all()
    assert ((drawn >= 0) | (labels == -100)).all()


def test_draws_at_the_edges():
    row = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert sample_classes(row.expand(3, 4), torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [1, 2, 2]


def test_no_label_at_all_is_no_loss():
    assert negative_log_likelihood(logits, torch.full((3, 4), -100)).tolist() == [0.0, 0.0, 0.0]


def test_names():
    def mine(model, batch): ...

    class Mine:
        def __call__(self, model, batch): ...

    assert measurement_name("margin") == "margin"
    assert measurement_name(mine).endswith("test_measurements.test_names.<locals>.mine")
    assert measurement_name(Mine()).endswith("Mine")
    assert check_measurement(mine) is mine
    with pytest.raises(UsageError, match="no such measurement") as raised:
        check_measurement("logits")
    assert raised.value.accepted.startswith("logprob, loss, margin")


def test_log_odds_are_the_margin_label_by_label():
    odds = log_odds(logits, labels)
    assert (
        odds.sum(1).tolist()
        == NAMED["margin"](logits, labels).tolist()
        == pytest.approx(by_hand(lambda p: math.log(p / (1 - p))))
    )
    assert (odds[labels == -100] == 0).all()
