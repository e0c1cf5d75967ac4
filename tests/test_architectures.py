"""A table of architectures with random weights: each fits, scores and states its coverage, and every gradient is autograd's."""

from __future__ import annotations

import copy
from typing import Any

import architectures
import pytest
import torch
import torch.nn.functional as F
from architectures import Architecture
from torch import Tensor, nn

import whence
from whence.capture import Capture
from whence.coverage import Coverage, cover
from whence.engine.stream import Sink, encode, likelihood, stream
from whence.errors import CoverageError
from whence.gradients import Gradient
from whence.tasks import Task

ROUNDING = 1e-9
SINGLE = 1e-5
"""Norms compute in float32 in some models, whatever the format of the weights."""

BY_NAME = {architecture.name: architecture for architecture in architectures.ALL}
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back:UserWarning")


def table(*names: str) -> pytest.MarkDecorator:
    """Run a test for the named architectures, or for all."""
    return pytest.mark.parametrize("architecture", [BY_NAME[name] for name in names or BY_NAME], ids=lambda each: each.name)


class Kept(Sink):
    """Keeps every gradient."""

    def __init__(self):
        self.gradients: dict[str, Gradient] = {}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        assert name not in self.gradients
        self.gradients[name] = gradient


def captured(model: nn.Module, task: Task, rows: Any, coverage: Coverage) -> dict[str, Tensor]:
    """Every example's gradient of its log-likelihood, `[B, O, I]`, all examples in one batch."""
    examples, kept = encode(task, rows), Kept()
    with Capture(model, coverage.sites) as capture:
        batches = [range(len(examples))]
        stream(capture, task, examples.items, batches, likelihood(task, examples), kept, lambda positions: None)
    return {name: gradient.dense().w_BOI for name, gradient in kept.gradients.items()}


def autograd(model: nn.Module, task: Task, rows: Any) -> nn.Module:
    """A copy of the model with the gradients of the summed log-likelihood by a plain backward pass."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    (-task.losses(twin, task.collate(encode(task, rows).items))).sum().backward()
    return twin


def matrix(model: nn.Module, name: str) -> Tensor:
    """`.grad` of the named weight in the layout of its site: outputs by inputs, a bias as the last column."""
    owner, _, expert = name.rpartition(".")
    if ".experts." in name:
        weight, bias = model.get_parameter(owner).grad[int(expert)], dict(model.named_parameters()).get(f"{owner}_bias")
        weight = weight.T if model.get_submodule(owner.rpartition(".")[0]).is_transposed else weight
        return weight if bias is None else torch.cat([weight, bias.grad[int(expert), :, None]], dim=1)
    module = model.get_submodule(name)
    weight, bias = module.weight.grad, getattr(module, "bias", None)
    if weight.ndim == 1:
        return torch.stack([weight] if bias is None else [weight, bias.grad])
    weight = weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias.grad[:, None]], dim=1)


def assert_equal(found: Tensor, expected: Tensor, bound: float, name: str) -> None:
    assert float((found - expected).norm()) <= bound * float(expected.norm()), name


def state(model: nn.Module) -> dict[str, Any]:
    """What a user could notice of a model, beside its weights."""
    return {
        name: (
            module.training,
            sorted(vars(module)),
            [len(value) for key, value in vars(module).items() if key.endswith("hooks")],
            [(key, parameter.requires_grad, parameter.grad) for key, parameter in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def everything(model: nn.Module, architecture: Architecture) -> Coverage:
    """All that can be tracked, heads, embeddings and norms too."""
    return cover(model, [name for name in cover(model, "*").sites if name not in architecture.names("shared")])


@table()
def test_every_gradient_is_autograds(architecture, tiny_tokenizer):
    model, task, rows = architecture.model(), architecture.task(tiny_tokenizer), architecture.rows()
    coverage = everything(model, architecture)
    found = captured(model, task, rows, coverage)
    uncalled = {name for name in coverage.sites if name.endswith("dt_proj")}  # Mamba multiplies with this weight by itself
    assert set(found) == set(coverage.sites) - uncalled
    total, third = autograd(model, task, rows), autograd(model, task, rows[2:3])
    for name, w_BOI in found.items():
        bound = SINGLE if architecture.single or coverage.sites[name].layer.kind == "norm" else ROUNDING
        assert w_BOI.shape[1:] == coverage.sites[name].shape, name
        assert_equal(w_BOI.sum(0), matrix(total, name), bound, name)
        assert_equal(w_BOI[2], matrix(third, name), bound, name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@table("Llama", "GPT-2", "T5", "Mixtral")
def test_gradients_are_autograds_through_checkpoints(architecture, tiny_tokenizer):
    model, task, rows = architecture.model(), architecture.task(tiny_tokenizer), architecture.rows()
    model.gradient_checkpointing_enable()
    coverage, calls = everything(model, architecture), []
    watch = model.get_submodule(architecture.names("attention")[0]).register_forward_hook(lambda *call: calls.append(call))
    found = captured(model, task, rows, coverage)
    watch.remove()
    assert len(calls) == 2, "the checkpoint computes it again"
    total = autograd(model, task, rows)
    for name in coverage.sites:
        assert_equal(found[name].sum(0), matrix(total, name), SINGLE if "norm" in name else ROUNDING, name)


@table()
def test_fits_and_scores_and_leaves_the_model_alone(architecture, tiny_tokenizer):
    model, task, rows = architecture.model(), architecture.task(tiny_tokenizer), architecture.rows()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    for modules in (None, "all"):
        curvature = whence.fit(model, task, rows, modules=modules)
        scores = whence.score(model, task, rows[:2], rows, curvature.inverse(), per="module")
        whole = whence.score(model, task, rows[:2], rows, curvature.inverse())
        assert scores.raw.shape == (2, len(rows)) and torch.isfinite(torch.from_numpy(whole.raw)).all()
        assert set(scores.modules) == set(curvature.blocks)
        parts = torch.from_numpy(sum(scores.modules.values()))
        assert_equal(parts, torch.from_numpy(whole.raw), ROUNDING, architecture.name)
        print(f"{architecture.name} | {modules or 'default'} | {curvature.about['coverage']}")
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@table()
def test_selectors_pick_what_they_say(architecture):
    model = architecture.model()
    mlp, attention, rest = (architecture.names(kind) for kind in ("mlp", "attention", "rest"))
    everywhere = {"mlp": mlp, "attention": attention, "all": mlp + attention + rest, "all,last-1": None, "last-1": None}
    last = {name for name in mlp + attention + rest if is_last(name)}
    everywhere |= {"all,last-1": last, "last-1": last & set(mlp)}
    for selector, names in everywhere.items():
        if names:
            assert set(cover(model, selector).sites) == set(names), selector
        else:
            with pytest.raises(CoverageError):
                cover(model, selector)


def is_last(name: str) -> bool:
    """Whether the first number in the name is that of the second layer."""
    return next((part for part in name.split(".") if part.isdigit()), "0") == "1"


@table()
def test_coverage_says_what_is_left_out(architecture):
    model = architecture.model()
    coverage, size = cover(model, "*"), sum(parameter.numel() for parameter in model.parameters())
    tracked = sum(site.parameters for site in coverage.sites.values())
    assert coverage.parameters + coverage.frozen == size
    assert tracked + sum(coverage.left_out.values()) == coverage.parameters
    assert sorted(coverage.left_out, key=lambda kind: -coverage.left_out[kind]) == architecture.left_out.split()
    assert all(kind in str(coverage) for kind in architecture.left_out.split())


@table("GPT-2", "T5", "BERT")
def test_what_all_examples_share_is_refused(architecture, tiny_tokenizer):
    model, task, rows = architecture.model(), architecture.task(tiny_tokenizer), architecture.rows()
    for name in architecture.names("shared"):
        with pytest.raises(CoverageError, match=rf"{name} computes can't be told apart by example +\[WHENCE-17\]"):
            captured(model, task, rows, cover(model, name))


def test_weights_used_outside_of_their_module_are_left_out(tiny_tokenizer):
    mamba = BY_NAME["Mamba"]
    about = whence.fit(mamba.model(), mamba.task(tiny_tokenizer), mamba.rows()).about
    assert about["without_gradient"] == ["backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"]
    assert not set(about["without_gradient"]) & set(about["modules"])
    assert "Linear" in about["coverage"] and about["share"] < cover(mamba.model(), "all").share


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@table("Mixtral", "Qwen3-MoE")
def test_experts_are_the_same_however_they_are_computed(architecture, implementation, tiny_tokenizer):
    task, rows = architecture.task(tiny_tokenizer), architecture.rows()
    model = architecture.model().float()
    coverage = cover(model, "mlp")
    expected = captured(model, task, rows, coverage)
    model.set_experts_implementation(implementation)
    for name, w_BOI in captured(model, task, rows, coverage).items():
        assert_equal(w_BOI, expected[name], 1e-4, name)


def test_an_expert_that_no_token_visits_is_left_out(tiny_tokenizer):
    mixtral = BY_NAME["Mixtral"]
    model = mixtral.model()
    router = model.model.layers[0].mlp.gate
    router.top_k = 1
    with torch.no_grad():  # one of the first two experts is always above zero
        router.weight[1], router.weight[2:] = -router.weight[0], 0
    curvature = whence.fit(model, mixtral.task(tiny_tokenizer), mixtral.rows(), method="ekfac")
    idle = [f"model.layers.0.mlp.experts.{name}.{expert}" for name in ("gate_up_proj", "down_proj") for expert in (2, 3)]
    assert curvature.about["without_gradient"] == idle and not set(idle) & set(curvature.blocks)
    scores = whence.score(model, mixtral.task(tiny_tokenizer), mixtral.rows()[:2], mixtral.rows(), curvature.inverse())
    assert scores.raw.shape == (2, len(mixtral.rows()))


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).clone()


class Packed(nn.Module):
    """What quantisation libraries put in place of a linear layer: two 4-bit weights in a byte, unpacked when used."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        packed = torch.randint(0, 256, (out_features * in_features // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat([self.weight >> 4, self.weight & 15], dim=1).to(x)
        return F.linear(x, (halves.view(self.out_features, self.in_features) - 7.5) / 30)


class Rows(Task):
    """Regression of a number, which the model is given as rows `[B, width]`."""

    def losses(self, model: nn.Module, batch: Any, noise: Tensor | None = None) -> Tensor:
        return (model(batch["inputs"]).squeeze(-1) - batch["targets"]).square() / 2


def pairs(width: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(width, dtype=torch.float64), torch.randn((), dtype=torch.float64)) for _ in range(6)]


def test_subclasses_of_linear_are_tracked():
    model, rows = nn.Sequential(Scaled(4, 6), nn.GELU(), nn.Linear(6, 1)).double(), pairs(4)
    found, expected = captured(model, Rows(), rows, cover(model, "all")), autograd(model, Rows(), rows)
    for name in ("0", "2"):
        assert_equal(found[name].sum(0), matrix(expected, name), ROUNDING, name)


def test_quantised_layers_are_tracked_and_counted_in_full():
    rows = pairs(4)
    model = nn.Sequential(nn.Linear(4, 6), Packed(6, 8), nn.GELU(), nn.Linear(8, 1)).double()
    coverage = cover(model, "all")
    assert coverage.sites["1"].parameters == 48 and coverage.parameters == 30 + 48 + 9
    assert cover(model, "0").left_out == {"Packed": 48, "Linear": 9}
    found = captured(model, Rows(), rows, coverage)
    plain = copy.deepcopy(model)
    plain[1] = nn.Linear(6, 8, bias=False).double()
    plain[1].weight.data = model[1](torch.eye(6, dtype=torch.float64)).T
    expected = autograd(plain, Rows(), rows)
    for name in coverage.sites:
        assert_equal(found[name].sum(0), matrix(expected, name), ROUNDING, name)


def test_a_weight_that_an_unknown_module_uses_too_is_left_out():
    class Lookup(nn.Module):
        def __init__(self, weight: nn.Parameter):
            super().__init__()
            self.weight = weight

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model.append(Lookup(model[0].weight))
    assert set(cover(model, "all").sites) == {"1"}


class Routed(nn.Module):
    """Sends the rows with a positive first number to one layer, the others to another one."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        y = torch.zeros_like(x)
        y[chosen], y[~chosen] = self.one(x[chosen]), self.other(x[~chosen])
        return self.head(y)


def test_routed_rows_are_refused():
    model, rows = Routed().double(), pairs(4)
    assert 0 < sum(float(x[0]) > 0 for x, _ in rows) < len(rows)
    with pytest.raises(CoverageError, match=r"(one|other) computes can't be told apart by example +\[WHENCE-17\]"):
        captured(model, Rows(), rows, cover(model, "all"))
    assert not model.one._forward_hooks and model.one.weight.requires_grad
    found, expected = captured(model, Rows(), rows, cover(model, "head")), autograd(model, Rows(), rows)
    assert_equal(found["head"].sum(0), matrix(expected, "head"), ROUNDING, "head")


def test_a_sequence_before_the_examples_is_refused():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.T.unsqueeze(-1)).sum(0)

    model = Transposed().double()
    with pytest.raises(CoverageError, match="WHENCE-17"):
        captured(model, Rows(), pairs(4), cover(model, "all"))


@table("Mixtral", "GPT-OSS")
def test_scores_per_token_add_up_with_experts(architecture, tiny_tokenizer):
    model, task, rows = architecture.model(), architecture.task(tiny_tokenizer), architecture.rows()
    curvature = whence.fit(model, task, rows)
    scores = whence.score(model, task, rows[:2], rows, curvature.inverse(), per="token")
    for column in range(len(rows)):
        total = scores.token_scores(0, column).sum()
        assert total == pytest.approx(scores.values[0, column], rel=1e-9)
