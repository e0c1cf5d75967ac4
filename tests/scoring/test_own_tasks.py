"""Tasks of one's own that return the wrong thing: the answer names the task and the line that mends it."""

import pytest
import torch
from torch import nn

import whence
from whence.errors import UsageError
from whence.operators import Identity
from whence.tasks import Task


class Pairs(Task):
    """Squared errors of mappings of one's own, per position."""

    def losses(self, model, batch, noise=None):
        return (model(batch["x"]).squeeze(-1) - batch["y"]).square().sum(1) / 2


class Column(Pairs):
    """One number per example, in a column."""

    def losses(self, model, batch, noise=None):
        return super().losses(model, batch)[:, None]


class ColumnOfQueries(Pairs):
    """The same of queries alone."""

    def measurements(self, model, batch):
        return -self.losses(model, batch)[:, None]


class Mean(Pairs):
    """One number for the batch."""

    def losses(self, model, batch, noise=None):
        return super().losses(model, batch).mean()


class Number(Pairs):
    """No tensor."""

    def measurements(self, model, batch):
        return 1.0


class Masked(Pairs):
    """A mask, and no word of how long examples are."""

    def positions(self, batch):
        return torch.ones(batch["x"].shape[:2])


class Long(Masked):
    """All that scores per token take."""

    def size(self, item):
        return len(item["x"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 1).double().eval()


@pytest.fixture
def rows():
    return [{"x": torch.randn(5, 3).double(), "y": torch.randn(5).double()} for _ in range(6)]


@pytest.mark.parametrize(
    ("task", "given", "fix"),
    [
        (Column, r"shape \(4, 1\) for 4 examples", r"\.squeeze\(1\)"),
        (ColumnOfQueries, r"shape \(2, 1\) for 2 examples", r"\.squeeze\(1\)"),
        (Mean, r"shape \(\) for 4 examples", "all dimensions but the first"),
        (Number, "a float for 2 examples", "all dimensions but the first"),
    ],
)
def test_queries_give_one_number_each(model, rows, task, given, fix):
    with pytest.raises(UsageError, match=rf"(?s){task.__name__} must give one number per example.*{given}.*{fix}"):
        whence.score(model, task(), rows[:2], rows, Identity())


def test_scores_per_token_need_positions_and_sizes(model, rows):
    with pytest.raises(UsageError, match=r"(?s)Pairs gives its examples none.*positions\(batch\).*per=\"example\""):
        whence.score(model, Pairs(), rows[:2], rows, Identity(), per="token")
    with pytest.raises(
        UsageError, match=r"(?s)Masked does not say how long example \d is.*1 by size\(item\), 5 by.*size\(item\)"
    ):
        whence.score(model, Masked(), rows[:2], rows, Identity(), per="token")
    scores = whence.score(model, Long(), rows[:2], rows, Identity(), per="token")
    assert [scores.token_scores(1, n).sum() for n in range(6)] == pytest.approx(scores.values[1].tolist())


class Pair(Pairs):
    """A tuple, as models that also return their logits give."""

    def losses(self, model, batch, noise=None):
        return super().losses(model, batch), 1


class Whole(Pairs):
    """Whole numbers."""

    def losses(self, model, batch, noise=None):
        return super().losses(model, batch).long()


class AlwaysNoise(Pairs):
    def losses(self, model, batch, noise):
        return super().losses(model, batch)


class Listed(Pairs):
    def collate(self, items):
        return [torch.stack([item[name] for item in items]) for name in ("x", "y")]


class Halved(Pairs):
    def size(self, item):
        return len(item["x"]) / 2


class Alone:
    """No subclass of Task."""

    def losses(self, model, batch, noise=None):
        return model(batch["x"]).sum()


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (Pair(), "Pair must give one number per example.*a tuple for 4"),
        (Whole(), "Whole must give one number per example.*int64"),
        (AlwaysNoise(), r"AlwaysNoise has losses that need further arguments.*noise=None"),
        (Task(), "Task has no losses"),
        (Listed(), "collate must give a mapping.*a list"),
        (Halved(), r"Halved\.size\(item\) must give.*2\.5 for item 0"),
        (Pairs, r"The task can't be a type.*an instance of it: Pairs\(\.\.\.\)"),
        (Alone(), r"The task can't be a Alone.*a subclass of whence\.Task"),
    ],
)
def test_what_a_task_gives_is_looked_at(model, rows, task, match):
    with pytest.raises(UsageError, match=f"(?s)^{match}"):
        whence.fit(model, task, rows)
