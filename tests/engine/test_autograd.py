"""Gradients are autograd's, or refused by name: where layers are not what their class says, rows out of order, and the like."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from models import CASES, llama, randomised, texts, tokenizer
from oracle import agree
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import whence
from whence.coverage import cover
from whence.engine import autograd
from whence.engine.matrices import Fisher
from whence.engine.point import Point
from whence.errors import CoverageError
from whence.fitting import fit_at
from whence.indexing import build_index_at
from whence.operators import Identity
from whence.progress import Silent, report_to
from whence.scoring.score import score_points, self_influence
from whence.settings import Fit, Index
from whence.tasks import Classification, Task
from whence.tasks.base import sample_classes
from whence.tasks.regression import signs

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
WIDTH, CLASSES = 5, 4


def pairs(*shape, count=7, seed=0):
    """Random inputs of this shape, with a class each."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64), number % CLASSES) for number in range(count)]


def of_parameters(model, task, rows, names=("",)):
    """Every row's gradient of its log-likelihood at the parameters of the named modules, by plain autograd, `[N, P]`."""
    model = model.eval()
    parameters = [p for name in names for p in model.get_submodule(name).parameters()]
    found = []
    for row in rows:
        value = -task.losses(model, task.collate(task.encode([row]))).sum()
        parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def assert_scores_are_autograds(model, rows, task=None, names=("",), modules=None):
    """Gradient dot products of all rows with all rows; and a fit and its scores come through."""
    task = task or Classification()
    expected = of_parameters(model, task, rows, names)
    operator = Identity(Point(model, task).cover(modules).sites)
    agree(whence.score(model, task, rows, rows, operator).raw, expected @ expected.T, 1e-9)
    inverse = whence.fit(model, task, rows, modules=modules).inverse()
    found = whence.score(model, task, rows[:2], rows, inverse)
    agree(found.raw, whence.score(model, task, rows[:2], rows, inverse, batch_tokens=1).raw, 1e-9)


def refused(model, rows, match, task=None, **settings):
    """Every verb refuses it, with a message that matches."""
    task = task or Classification()
    for verb in (
        lambda: whence.fit(model, task, rows, **settings),
        lambda: whence.score(model, task, rows[:2], rows, Identity(), **settings),
        lambda: self_influence(model, task, rows, Identity(), **settings),
        lambda: whence.build_index(model, task, rows, **settings),
    ):
        with pytest.raises(CoverageError, match=match) as raised:
            verb()
        assert "[WHENCE-24]" in str(raised.value) or "told apart" in str(raised.value)
    return str(raised.value)


# weights that are made from parameters: the gradient is that of the parameters


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight.tanh()


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.4)


def pruned_bias(layer):
    return prune.random_unstructured(prune.l1_unstructured(layer, "weight", 2), "bias", 0.5)


def parametrised(layer):
    return parametrize.register_parametrization(layer, "weight", Doubled())


MADE = {
    "pruned": pruned,
    "pruned with its bias": pruned_bias,
    "weight norm": parametrizations.weight_norm,
    "weight norm, old": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, old": lambda layer: nn.utils.spectral_norm(layer),
    "parametrised": parametrised,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_linear_layer_whose_weight_is_made(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Linear(WIDTH, 6)), nn.Tanh(), make(nn.Linear(6, CLASSES))).double()
    assert_scores_are_autograds(model, pairs(WIDTH))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_convolution_whose_weight_is_made(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Conv2d(2, 3, 3, padding=1)), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)).double()
    assert_scores_are_autograds(model, pairs(2, 4, 4))


# layers that are not what their class says


class Masked(nn.Linear):
    def forward(self, x):
        mask = torch.arange(self.weight.numel()).view_as(self.weight) % 3 > 0
        return F.linear(x, self.weight * mask, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Rounded(nn.Linear):
    """Trained through its rounding."""

    def forward(self, x):
        scale = self.weight.abs().max() / 3
        rounded = (self.weight / scale).round() * scale
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias).square()


class Standardised(nn.Conv2d):
    """As in BiT."""

    def forward(self, x):
        mean, variance = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias)


class Residual(nn.Linear):
    """Adds a part of its own input, which its weight is multiplied with a second time."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.sin())


def patched():
    layer = nn.Linear(WIDTH, 6)
    layer.forward = lambda x: F.linear(x, layer.weight.tanh(), layer.bias)
    return layer


@pytest.mark.parametrize("layer", [Masked(WIDTH, 6), Scaled(WIDTH, 6), Rounded(WIDTH, 6), Residual(WIDTH, 6), patched()])
def test_a_linear_layer_that_computes_something_else(layer):
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, CLASSES)).double()
    said = refused(model, pairs(WIDTH), "^0 does not compute what its kind of layer does")
    assert "--modules '2'" in said
    whence.fit(model, Classification(), pairs(WIDTH), modules="2")
    whence.fit(model, Classification(), pairs(WIDTH), check=False)


class Powers(nn.Module):
    """Has the widths of a linear layer, and a weight for each power of each input."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.weight = nn.Parameter(torch.randn(out_features, in_features, 3))

    def forward(self, x):
        return (torch.stack([x, x**2, x**3], -1)[:, None] * self.weight).sum((2, 3))


class Sines(Powers):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x):
        return x.sin() @ self.weight.T


class Offset(nn.Module):
    """Adds one to its weight, as some normalisations do, under a name that says no more."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(6)), 1e-2

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * (1 + self.weight)


def test_modules_that_look_like_a_layer():
    model = nn.Sequential(Powers(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    assert set(cover(model, "*").sites) == {"2"}
    refused(nn.Sequential(Sines(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double(), pairs(5), "^0 does not compute")
    Offset.__name__ = "OffsetRMSNorm"
    model = nn.Sequential(nn.Linear(5, 6), Offset(), nn.Linear(6, CLASSES)).double()
    with pytest.raises(CoverageError, match="^1 does not compute what its kind of layer does"):
        whence.fit(model, Classification(), pairs(5), modules="*")


def test_a_standardised_convolution():
    model = nn.Sequential(Standardised(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)).double()
    refused(model, pairs(2, 4, 4), r"^0 does not compute.*\n.*Standardised scales, masks")


# rows that are not in the order of the examples


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1)).tanh().mean(0))


class Flattened(TimeFirst):
    """Frames that were transposed before they were flattened."""

    def forward(self, x):
        y = self.layer(x.transpose(0, 1).flatten(0, 1)).tanh()
        return self.head(y.unflatten(0, (x.shape[1], x.shape[0])).mean(0))


class Packed(TimeFirst):
    def forward(self, x):
        packed = pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
        y = PackedSequence(self.layer(packed.data).tanh(), *packed[1:])
        return self.head(pad_packed_sequence(y, batch_first=True)[0].mean(1))


class Sorted(TimeFirst):
    def __init__(self, descending):
        super().__init__()
        self.descending = descending

    def forward(self, x):
        order = x[:, 0, 0].sort(descending=self.descending).indices
        return self.head(self.layer(x[order]).tanh().mean(1)[order.argsort()])


@pytest.mark.parametrize("build", [Flattened, Packed, lambda: Sorted(True), lambda: Sorted(False)])
def test_rows_out_of_order(build):
    model = randomised(build().double())
    said = refused(model, pairs(4, 6), "^The rows that layer is called with are not in the order of the examples")
    assert "--modules 'head'" in said


@pytest.mark.parametrize("positions", [2, 3, 7])
def test_time_first(positions):
    """Where there are as many positions as examples in a batch, the shapes say nothing."""
    refused(randomised(TimeFirst().double()), pairs(positions, 6), "layer.*(told apart|not in the order)")


class Clips(nn.Module):
    """Convolutions over the frames of clips, some of them in groups."""

    def __init__(self, groups):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1, groups=groups), nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.conv(x.flatten(0, 1)).tanh().mean((2, 3))
        return self.head(y.unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_frames_of_clips(groups):
    assert_scores_are_autograds(randomised(Clips(groups).double()), pairs(3, 2, 4, 4))


# weights that several modules share


class Tied(nn.Module):
    """One weight, and a bias for each of its uses, or for one of them."""

    def __init__(self, second_bias):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5, bias=second_bias), nn.Linear(5, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def test_rare_embeddings():
    """Sparse gradients, and ones that are divided by how often a token comes in the batch."""
    rows = [(torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(n)), n % CLASSES) for n in range(7)]
    for option in ("sparse", "scale_grad_by_freq"):
        model = randomised(Mean(nn.Embedding(9, 6, **{option: True})).double())
        task, operator = Classification(), Identity(("embed", "head"))
        if option == "sparse":
            expected = torch.stack(
                [torch.cat([g.to_dense().flatten() for g in gradient_of(model, task, row, NAMES)]) for row in rows]
            )
            agree(whence.score(model, task, rows, rows, operator).raw, expected @ expected.T, 1e-9)
        else:
            with pytest.raises(CoverageError, match="WHENCE-24"):
                whence.score(model, task, rows, rows, operator)


NAMES = ("embed.weight", "head.weight", "head.bias")


class Mean(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed, self.head = embed, nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


@pytest.mark.parametrize("second_bias", [True, False])
def test_tied_weights_whose_biases_are_not_tied(second_bias):
    model = randomised(Tied(second_bias).double())
    rows, task = pairs(WIDTH), Classification()
    names = [name for name, _ in model.named_parameters()]
    every = [torch.stack(part) for part in zip(*(gradient_of(model, task, row, names) for row in rows), strict=True)]
    expected = sum(part.flatten(1) @ part.flatten(1).T for part in every)
    agree(whence.score(model, task, rows, rows, Identity()).raw, expected, 1e-9)
    inverse = whence.fit(model, task, rows, method="diagonal", labels="data", disjoint=False).inverse(absolute=1.0)
    damped = sum((part / (1 + part.square().mean(0))).flatten(1) @ part.flatten(1).T for part in every)
    agree(whence.score(model, task, rows, rows, inverse).raw, damped, 1e-9)


def gradient_of(model, task, row, names):
    value = -task.losses(model, task.collate([row])).sum()
    return torch.autograd.grad(value, [model.get_parameter(name) for name in names])


class HeadWithBias(nn.Module):
    """A language model whose head shares the embedding's weight, and has a bias of its own."""

    def __init__(self, functional):
        super().__init__()
        self.functional = functional
        self.embed, self.layer, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        x = self.layer(self.embed(input_ids)).tanh()
        logits = F.linear(x, self.embed.weight, self.head.bias) if self.functional else self.head(x)
        return CausalLMOutput(logits=logits)


def test_an_embedding_tied_to_a_head_with_a_bias():
    model, task, rows = randomised(HeadWithBias(False).double()), CASES["llama"].task(), texts(5, seed=4)
    expected = of_parameters(model, task, rows)
    operator = Identity(("embed", "layer"))
    agree(whence.score(model, task, rows, rows, operator).raw, expected @ expected.T, 1e-9)
    whence.fit(model, task, rows, modules=["embed", "layer"])


def test_an_embedding_tied_by_a_call_of_a_function():
    model, task, rows = randomised(HeadWithBias(True).double()), CASES["llama"].task(), texts(5, seed=4)
    with pytest.raises(CoverageError, match="The weight of embed is also used where its module is not called") as raised:
        whence.fit(model, task, rows, modules=["embed", "layer"])
    assert "--modules 'layer'" in str(raised.value)


class Twice(nn.Module):
    """Multiplies with a tracked weight once more, where no module is called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh()
        return self.head(F.linear(x, self.first.weight).tanh())


def test_a_weight_used_where_no_hook_sees_it():
    said = refused(randomised(Twice().double()), pairs(5), "^The weight of first is also used where its module is not called")
    assert "--modules 'second,head'" in said


class Notes(Silent):
    def __init__(self):
        self.seen = []

    def note(self, text):
        self.seen.append(text)


class NeverCalled(Twice):
    def forward(self, x):
        x = F.linear(x, self.first.weight, self.first.bias).tanh()
        return self.head(self.second(x).tanh())


def test_a_module_that_is_never_called_is_left_out_by_name():
    model, rows, notes = randomised(NeverCalled().double()), pairs(5), Notes()
    with report_to(notes):
        assert whence.fit(model, Classification(), rows).about["without_gradient"] == ["first"]
    assert "1 modules are left out: their weights are used without calling them (first)" in notes.seen
    expected = of_parameters(model, Classification(), rows, ("second", "head"))
    agree(whence.score(model, Classification(), rows, rows, Identity()).raw, expected @ expected.T, 1e-9)


# rows that see each other, padding, and chance


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.head = nn.Linear(5, 6), between, nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.between(self.first(x).tanh()))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Ranged(nn.Module):
    def forward(self, x):
        return x / x.abs().max()


class Attending(nn.Module):
    """Attends over the batch, as a sequence of rows."""

    def forward(self, x):
        return x + (x @ x.T).softmax(-1) @ x


class Dropped(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


@pytest.mark.parametrize("between", [nn.BatchNorm1d(6, track_running_stats=False), Centred(), Ranged(), Attending()])
def test_rows_that_see_each_other(between):
    model = randomised(Between(between).double())
    refused(model, pairs(5), rf"^Rows see each other.* between \({type(between).__name__}\)")
    task, rows = Classification(), pairs(5)
    whence.fit(model, task, rows, check=False)
    if not isinstance(between, nn.BatchNorm1d):
        expected = of_parameters(model, task, rows)
        agree(whence.score(model, task, rows, rows, Identity(), batch_tokens=1).raw, expected @ expected.T, 1e-9)


def test_dropout_that_is_always_on():
    torch.manual_seed(0)
    refused(randomised(Between(Dropped()).double()), pairs(5), r"^The same rows give other.*first in between \(Dropped\)")


class Contrastive(Task):
    def losses(self, model, batch, noise=None):
        x = F.normalize(model(batch["inputs"]), dim=-1)
        return F.cross_entropy(x @ x.T.roll(1, 0), torch.arange(len(x)), reduction="none")


class Noisy(Classification):
    def losses(self, model, batch, noise=None):
        return super().losses(model, batch, noise) * torch.rand(len(batch["inputs"]))


def test_losses_over_the_batch_and_losses_of_chance():
    torch.manual_seed(0)
    model = CASES["mlp"].model()
    refused(model, pairs(5), "^Rows see each other, first in the loss of Contrastive", Contrastive())
    refused(model, pairs(5), "^The same rows give other numbers each time, first in the loss of Noisy", Noisy())


class Averaging(nn.Module):
    """Takes means over all positions, padding among them, whatever the mask says."""

    def __init__(self, masked):
        super().__init__()
        self.masked = masked
        self.embed, self.layer, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        x = self.layer(self.embed(input_ids)).tanh()
        weight = attention_mask.to(x) if self.masked else torch.ones_like(input_ids).to(x)
        return self.head((x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))


@pytest.mark.parametrize("masked", [True, False])
def test_padding_that_is_taken_for_text(masked):
    model = randomised(Averaging(masked).double())
    task = Classification(tokenizer())
    rows = [{"text": " ".join(f"w{n}" for n in range(length)), "label": length % 3} for length in (4, 9, 11, 6, 14, 12)]
    expected = of_parameters(model, task, rows, ("layer", "head"))
    alone = whence.score(model, task, rows, rows, Identity(("layer", "head")), batch_tokens=1).raw
    agree(alone, expected @ expected.T, 1e-9)
    if masked:
        whence.fit(model, task, rows)
    else:
        refused(model, rows, r"^What layer learns from a row depends on the padding beside it(.|\n)*--batch-tokens 1", task)


# models that are what they seem, in every format, are not refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shorter_formats_are_measured_by_their_rounding(dtype):
    torch.manual_seed(0)
    model, rows = llama().to(dtype).eval(), texts(8, seed=1)
    whence.fit(model, CASES["llama"].task(), rows, modules="all")
    halved = randomised(Between(Centred())).to(dtype)
    with pytest.raises(CoverageError, match="Rows see each other"):
        whence.fit(halved, Classification(), [(x.to(dtype), y) for x, y in pairs(5)])
    scaled = randomised(nn.Sequential(Scaled(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))).to(dtype)
    with pytest.raises(CoverageError, match="0 does not compute"):
        whence.fit(scaled, Classification(), [(x.to(dtype), y) for x, y in pairs(5)])


def test_queries_are_checked_by_what_is_measured_of_them():
    def over_the_batch(model, batch):
        return (model(batch["inputs"]) - model(batch["inputs"]).mean(0)).square().sum(1)

    model, rows = CASES["mlp"].model(), pairs(5)
    with pytest.raises(CoverageError, match="the loss of Classification.*\n.*for query"):
        whence.score(model, Classification(measurement=over_the_batch), rows[:3], rows, Identity())


def test_the_check_is_done_once_for_a_folder(tmp_path, monkeypatch):
    case, model, calls = CASES["mlp"], CASES["mlp"].model(), []
    compare = autograd._compare
    monkeypatch.setattr(autograd, "_compare", lambda *given: calls.append(1) or compare(*given))

    class Stop(Exception):
        pass

    def stop(*given):
        raise Stop

    monkeypatch.setattr(importlib.import_module("whence.fitting.fit")._Fit, "fit", stop)
    for expected in (1, 0):
        calls.clear()
        with pytest.raises(Stop):
            whence.fit(model, case.task(), case.train(), out=tmp_path / "factors")
        assert len(calls) == expected


def test_the_check_is_done_once_for_a_point(monkeypatch):
    case, compared = CASES["mlp"], []
    compare = autograd._compare
    monkeypatch.setattr(autograd, "_compare", lambda sample, *given: compared.append(sample) or compare(sample, *given))
    point, other = Point(case.model(), case.task(), case.train()), Point(case.model(), case.task(), case.train())

    def count(work):
        compared.clear()
        work()
        return len(compared)

    names = [*point.cover("all").sites]
    assert count(lambda: fit_at(point, Fit().changed(modules=tuple(names[:1])))) == 1
    assert count(lambda: fit_at(point, Fit().changed(modules="all"))) == 1  # other modules, which nothing was known of
    assert count(lambda: fit_at(point, Fit().changed(modules=tuple(names[:1])))) == 0
    assert count(lambda: build_index_at(point.only([0, 1, 2]), Index().changed(modules="all", kind="projections"))) == 0
    queries, others = point.rows[:2], point.rows[2:4]
    assert count(lambda: score_points(point, point, queries, Identity())) == 1  # of what is asked
    assert count(lambda: score_points(point, point.of(point.rows[3:]), queries, Identity())) == 0
    assert count(lambda: score_points(point, point, others, Identity())) == 1
    assert count(lambda: score_points(point, point.at(other.model), queries, Identity())) == 1  # other weights
    assert count(lambda: fit_at(other, Fit().changed(modules="all"))) == 1


def test_models_keep_their_gradients_and_flags():
    model = CASES["mlp"].model()
    first, *rest = model.parameters()
    first.grad, first.requires_grad = torch.ones_like(first), False
    owned = first.grad
    whence.fit(model, Classification(), pairs(5))
    assert first.grad is owned and owned.eq(1).all() and not first.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in rest)


# labels that a task draws, or does not


class Own(Task):
    """Cross-entropy, whatever the noise."""

    def losses(self, model, batch, noise=None):
        return F.cross_entropy(model(batch["inputs"]), batch["targets"], reduction="none")


class WithoutNoise(Own):
    def losses(self, model, batch):
        return super().losses(model, batch)


class Drawing(Own):
    def losses(self, model, batch, noise=None):
        logits = model(batch["inputs"])
        labels = batch["targets"] if noise is None else sample_classes(logits, noise)
        return F.cross_entropy(logits, labels, reduction="none")


class Signs(Task):
    """Half the squared error of one number: its loss is the same for either target that is drawn, its gradient is not."""

    def losses(self, model, batch, noise=None):
        found = model(batch["inputs"])[:, 0]
        target = batch["targets"].double() if noise is None else found.detach() + signs(noise).to(found)
        return (found - target).square() / 2


@pytest.mark.parametrize(
    ("task", "labels"), [(Own(), "data"), (WithoutNoise(), "data"), (Drawing(), "model"), (Signs(), "model")]
)
def test_a_task_that_draws_no_labels_is_recorded_as_empirical(task, labels):
    model, rows, notes = CASES["mlp"].model(), pairs(5), Notes()
    with report_to(notes):
        curvature = whence.fit(model, task, rows, disjoint=False, draws=2)
    assert curvature.about["labels"] == labels
    said = f"warning: {type(task).__name__}.losses draws no labels"
    assert any(said in note and "empirical" in note for note in notes.seen) is (labels == "data")
    fisher = Fisher(Point(model, task, rows))
    assert fisher.labels == labels and ("empirical" in fisher.label) is (labels == "data")
    if labels == "data":
        assert curvature.about["draws"] == 1
        own = whence.fit(model, Classification(), rows, disjoint=False, labels="data")
        for name, block in curvature.blocks.items():
            agree(block.lam_OI, own.blocks[name].lam_OI)


# what only a larger batch shows, modules that are called in odd ways, batches in another order


class RolledBatch(nn.Module):
    """Calls its layer with the rows of a batch of three or more in another order."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        order = torch.arange(len(x)).roll(int(len(x) > 2))
        return self.head(self.first(x[order])[order.argsort()].tanh())


class OneByOne(nn.Module):
    """Calls its layer with one example after the other, without a dimension for them."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(torch.stack([self.layer(row) for row in x]).tanh().flatten(1))


class Mapped(OneByOne):
    def forward(self, x):
        return torch.vmap(lambda row: self.head(self.layer(row).tanh()))(x)


class Energy(OneByOne):
    """Reads the slope of what its layer gives."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.layer(x).square().sum(), x, create_graph=True)
        return self.head(slope)


def test_rows_out_of_order_in_larger_batches():
    refused(RolledBatch().double(), pairs(5), "^The rows that first is called with are not in the order of the examples")


@pytest.mark.parametrize(
    ("model", "shape", "match"),
    [
        (OneByOne(nn.Linear(5, 4), 4), (5,), "^What layer computes can't be told apart"),
        (OneByOne(nn.Conv2d(1, 4, 3), 16), (1, 4, 4), "^What layer computes can't be told apart"),
        (OneByOne(nn.LayerNorm([4, 5]), 20), (4, 5), "^What layer computes can't be told apart"),
        (Mapped(nn.Linear(5, 6), 6), (5,), "^layer is called inside of torch.vmap"),
        (Energy(nn.Linear(5, 6), 5), (5,), "^What layer computes is differentiated inside of forward"),
    ],
    ids=["linear", "convolution", "norm", "vmap", "slopes"],
)
def test_calls_that_no_example_can_be_found_in(model, shape, match):
    model, rows = model.double(), pairs(*shape)
    with pytest.raises(CoverageError, match=rf"(?s){match}.*--modules 'head'"):
        whence.fit(model, Classification(), rows, modules="*")


def test_a_norm_over_several_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm([2, 5]), nn.Flatten(), nn.Linear(10, CLASSES)).double()
    assert_scores_are_autograds(randomised(model), pairs(2, 5), modules="*")


class SortsItsRows(Own):
    def collate(self, items):
        return super().collate(sorted(items, key=lambda item: float(item[0].sum())))


def test_a_collate_that_sorts():
    refused(CASES["mlp"].model(), pairs(5), "^SortsItsRows gives the losses of a batch in another order", SortsItsRows())


def zero(parameter):
    parameter.data.zero_()


def test_optimizers_in_the_backward_pass_do_not_step():
    model, rows = CASES["mlp"].model(), pairs(5)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(zero)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    whence.fit(model, Classification(), rows)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), weights, strict=True))
    model(rows[0][0][None]).sum().backward()
    assert not any(parameter.any() for parameter in model.parameters())  # they are there, still
