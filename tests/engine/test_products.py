"""Products with curvature matrices against the dense matrices, in float64.

The dense Gauss-Newton matrix is made of the logits' Jacobian, the Hessian of autograd's, Fisher matrices of the oracle's
gradients, one example at a time, over all tracked weights together.
"""

import architectures
import pytest
import torch
from models import CASES, gpt2, llama, neox, randomised, texts, tokenizer
from oracle import agree, likelihoods, log_likelihood, text_logits, traces
from torch import nn

from whence.attention import plain_attention
from whence.capture import Capture
from whence.coverage import cover
from whence.engine.products import FisherProduct, Weights, curvature_product, gauss_newton, hessian
from whence.engine.stream import Sink, drawn_likelihood, encode, likelihood, stream
from whence.errors import CoverageError, UsageError
from whence.gradients import Dense, dot
from whence.linalg.krylov import block_cg, inner
from whence.tasks import CausalLM, Classification, Regression, Task

TEXT = {"llama": llama, "gpt2": gpt2, "neox": neox}


def wide(model):
    """The model with norms that do not go through float32, as Llama's do."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def language_model(kind, **settings):
    torch.manual_seed(0)
    return wide(randomised(TEXT[kind](**settings).double().eval()))


def setting(name):
    """Model, task, rows and selector."""
    if name in TEXT:
        return language_model(name), CausalLM(tokenizer()), texts(5, seed=1), "last-1,all,*norm*,*ln_*"
    if name == "regression":
        generator = torch.Generator().manual_seed(1)
        draw = lambda width: torch.randn(width, generator=generator, dtype=torch.float64)  # noqa: E731
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        return model, Regression(), [(draw(3), draw(2)) for _ in range(3)], "all"
    case = CASES[name]
    return case.model(), case.task(), case.train(6), case.modules


class Ask(nn.Module):
    """What one row's loss is made of: the logits (or predictions) that are in it, and their labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, item):
        if isinstance(item, tuple):
            return self.model(item[0][None]), item[1]
        with plain_attention():
            return text_logits(item)(self.model), torch.from_numpy(item.ids[1:])[torch.from_numpy(item.in_loss[1:])]


def loss(h, label):
    """Of a row, by its definition."""
    if isinstance(label, torch.Tensor) and label.is_floating_point():
        return (h[0] - label).square().sum() / 2
    return nn.functional.cross_entropy(h, torch.as_tensor(label).reshape(-1), reduction="sum")


def dense(which, model, items, weights):
    """The sum over rows of their matrices over all the weights in one vector."""
    shapes = {name: value.shape for name, value in weights.values.items()}
    theta = torch.cat([value.flatten() for value in weights.values.values()])

    def row(at, item):
        parts = at.split([shape.numel() for shape in shapes.values()])
        swapped = {f"model.{name}": part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(Ask(model), swapped, (item,))

    if which is hessian:
        total = lambda at: sum(loss(*row(at, item)) for item in items)  # noqa: E731
        return torch.autograd.functional.hessian(total, theta, vectorize=True)
    matrix = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    for item in items:
        jacobian = torch.autograd.functional.jacobian(lambda at, item=item: row(at, item)[0], theta, vectorize=True)
        h, label = row(theta, item)
        for p, j in zip(h.detach().softmax(-1), jacobian, strict=True):
            gaussian = isinstance(label, torch.Tensor) and label.is_floating_point()
            matrix += j.T @ (torch.eye(len(p)).double() if gaussian else torch.diag(p) - torch.outer(p, p)) @ j
    return matrix


def vectors(sites, count=3):
    return {name: torch.randn(count, *site.shape, dtype=torch.float64) for name, site in sites.items()}


def flat(weights, block):
    return torch.cat([part.flatten(1) for part in weights.spread(block).values()], dim=1)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("which", [gauss_newton, hessian])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "mlp", "conv", "norms", "attention", "repeated", "regression"])
def test_products_are_those_of_the_dense_matrix(name, which):
    model, task, rows, modules = setting(name)
    items, sites = encode(task, rows).items, cover(model, modules).sites
    v, told, weights = vectors(sites), [], Weights(model, sites)
    found = curvature_product(which, model, task, sites, items, [[1, 0], [2]], v, told.append)
    assert relative(flat(weights, found), flat(weights, v) @ dense(which, model, items[:3], weights)) < 1e-9
    assert told == [sum(task.size(items[index]) for index in batch) for batch in ([0, 1], [2])]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt2-norms", "mlp", "conv", "norms", "attention", "repeated"])
def test_weights_are_the_matrices_that_gradients_are_taken_of(name):
    case = CASES[name]
    model, task = case.model(), case.task()
    sites = cover(model, case.modules).sites
    (item, *_) = encode(task, case.train()).items
    weights = Weights(model, sites)
    at = {each: value.clone().requires_grad_() for each, value in weights.values.items()}
    value = torch.func.functional_call(Value(model, log_likelihood(item)), {f"model.{each}": w for each, w in at.items()}, ())
    slopes = dict(zip(at, torch.autograd.grad(value, list(at.values())), strict=True))
    expected = traces(model, list(sites), [log_likelihood(item)])[0]
    for site, w_OI in weights.gather(slopes).items():
        agree(w_OI, expected[site].w_OI)
    v = vectors(sites)
    back = weights.gather(weights.spread(v))
    assert all(torch.equal(v[site], back[site]) for site in sites)


class Value(nn.Module):
    def __init__(self, model, value):
        super().__init__()
        self.model, self.value = model, value

    def forward(self):
        return self.value(self.model)


@pytest.mark.parametrize("labels", ["sampled", "data"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "mlp"])
def test_fisher_products_are_those_of_the_gradients(name, labels):
    model, task, rows, modules = setting(name)
    examples, sites = encode(task, rows), cover(model, modules).sites
    objective = likelihood(task, examples) if labels == "data" else drawn_likelihood(task, examples, "0:covariance")
    v = vectors(sites)
    sink = FisherProduct(v)
    with Capture(model, sites) as capture:
        stream(capture, task, examples.items, [[0, 1], [4, 3, 2]], objective, sink, lambda positions: None)
    values = likelihoods(task, examples.items, examples.ids, labels, "covariance")[:5]
    expected = traces(model, list(sites), values)
    g = {site: Dense(torch.stack([trace[site].w_OI for trace in expected])) for site in sites}
    along_KB = dot({site: Dense(w_KOI) for site, w_KOI in v.items()}, g)
    for site in v:
        sums_KOI = sink.sums[site]
        assert relative(sums_KOI, torch.einsum("kb,boi->koi", along_KB, g[site].w_BOI)) < 1e-9


def damped(product, n_rows, absolute):
    """`G + absolute` as a map of blocks."""
    return lambda v: {name: part / n_rows + absolute * v[name] for name, part in product(v).items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_block_cg_on_gradients_is_the_dense_damped_inverse(name):
    model, task, rows, _ = setting(name)
    items, sites = encode(task, rows).items, cover(model, "last-1").sites
    weights, everything = Weights(model, sites), [list(range(len(items)))]
    matrix = dense(gauss_newton, model, items, weights) / len(items)
    absolute = 1e-3 * float(matrix.diagonal().mean())
    sink = Rows()
    with Capture(model, sites) as capture:
        stream(capture, task, items, everything, likelihood(task, encode(task, rows)), sink, lambda positions: None)

    def product(v):
        return curvature_product(gauss_newton, model, task, sites, items, everything, v)

    found = block_cg(damped(product, len(items), absolute), sink.rows, tolerance=1e-9)
    solved = torch.linalg.solve(matrix + absolute * torch.eye(len(matrix)).double(), flat(weights, sink.rows).T).T
    assert relative(flat(weights, found.x), solved) < 1e-6


class Rows(Sink):
    """Keeps the gradients as a block."""

    def __init__(self):
        self.rows = {}

    def receive(self, name, gradient, readers):
        self.rows[name] = gradient.dense().w_BOI


def test_many_vectors_come_out_as_one_after_the_other(monkeypatch):
    model, task, rows, modules = setting("llama")
    items, sites = encode(task, rows).items, cover(model, modules).sites
    v = vectors(sites, 5)
    whole = curvature_product(gauss_newton, model, task, sites, items, [[0, 1]], v)
    monkeypatch.setattr("whence.engine.products.TANGENTS", 1)
    single = curvature_product(gauss_newton, model, task, sites, items, [[0, 1]], v)
    assert all(relative(single[name], whole[name]) < 1e-12 for name in v)


def state(model):
    """What is borrowed."""
    modules = [(len(module._forward_hooks), module.training, sorted(vars(module))) for module in model.modules()]
    parameters = [(id(parameter), parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return modules, parameters, {name: value.tolist() for name, value in model.state_dict().items()}


class Cubed(torch.autograd.Function):
    """Without a forward derivative; `Once` without a second one, too."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, *g):
        return 3 * ctx.saved_tensors[0] ** 2 * g[0]


class Once(Cubed):
    backward = torch.autograd.function.once_differentiable(Cubed.backward)


class Cubes(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x**3 if self.function is None else self.function.apply(x)


def test_the_model_is_borrowed_also_where_it_can_not_be_differentiated():
    model, task, rows, modules = setting("mlp")
    model.train()
    model[2].weight.requires_grad_(False)
    items, sites = encode(task, rows).items, cover(model, modules).sites
    v, before = vectors(sites), state(model)
    curvature_product(gauss_newton, model, task, sites, items, [[0, 1]], v)
    assert state(model) == before
    model[1] = Cubes(Once)
    before = state(model)
    with pytest.raises(CoverageError, match="Cubes can't be differentiated forwards or twice") as raised:
        curvature_product(gauss_newton, model, task, sites, items, [[0, 1]], v)
    assert "attention" in raised.value.fix and state(model) == before
    with pytest.raises(RuntimeError, match="differentiate twice"):
        curvature_product(hessian, model, task, sites, items, [[0, 1]], v)


def test_without_a_forward_derivative_there_are_two_backward_passes():
    model, task, rows, modules = setting("mlp")
    items, sites = encode(task, rows).items, cover(model, modules).sites
    v, found = vectors(sites), []
    for function in (None, Cubed):
        model[1] = Cubes(function)
        found.append(curvature_product(gauss_newton, model, task, sites, items, [[0, 1, 2]], v))
    assert all(relative(found[1][name], found[0][name]) < 1e-12 for name in v)


def test_checkpoints_are_off_and_the_fused_head_is_not_used(monkeypatch):
    model, task, rows, modules = setting("gpt2")
    items, sites = encode(task, rows).items, cover(model, modules).sites
    v = vectors(sites)
    expected = [curvature_product(of, model, task, sites, items, [[0, 1]], v) for of in (gauss_newton, hessian)]
    model.activation_checkpointing_enable()
    model.train()
    monkeypatch.setattr("whence.tasks.head.LOGITS", 4)
    for of, block in zip((gauss_newton, hessian), expected, strict=True):
        found = curvature_product(of, model, task, sites, items, [[0, 1]], v)
        assert all(relative(found[name], block[name]) < 1e-9 for name in v)
    assert model.training


def test_mistakes_are_named():
    model, task, rows, modules = setting("mlp")
    items, sites = encode(task, rows).items, cover(model, modules).sites

    class Doubled(Classification):
        def losses(self, model, batch, noise=None):
            return 2 * super().losses(model, batch, noise)

    class Own(Task):
        def losses(self, model, batch, noise=None):
            return model(batch["inputs"]).square().sum(1)

    for other, text in ((Doubled(), "Doubled, whose loss is another one"), (Own(), "not known")):
        with pytest.raises(UsageError, match=text):
            curvature_product(gauss_newton, model, other, sites, items, [[0]], vectors(sites))
    model[0].weight = nn.Parameter(model[0].weight.data.to(torch.uint8), requires_grad=False)
    with pytest.raises(CoverageError, match="The weight of 0 is packed"):
        curvature_product(gauss_newton, model, task, sites, items, [[0]], vectors(sites))


@pytest.mark.parametrize("name", ["T5", "GPT-OSS", "BLOOM"])
def test_encoders_and_decoders_experts_and_functions_without_forward_derivatives(name):
    """The matrix is symmetric, and its products go forwards one way and backwards the other."""
    architecture = next(each for each in architectures.ALL if each.name == name)
    model, task, rows = architecture.model().double(), architecture.task(tokenizer()), architecture.rows()
    items, sites = encode(task, rows).items, cover(model, "all").sites
    u, v = vectors(sites), vectors(sites)
    gu, gv = (curvature_product(gauss_newton, model, task, sites, items, [[0, 1]], block) for block in (u, v))
    agree(inner(u, gv), inner(gu, v), 1e-5)  # some norms are in float32
    assert (inner(v, gv).diag() > 0).all()
