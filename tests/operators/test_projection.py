"""Projected inner products: unbiased, exact without loss of dimensions, less noisy with more of them."""

import functools

import pytest
import torch
from models import CASES, named
from oracle import agree, traced

from whence.capture import Capture
from whence.coverage import cover
from whence.engine.stream import Sink, encode, likelihood, stream
from whence.fitting import fit
from whence.gradients import Dense
from whence.indexing.rows import ProjectedRows
from whence.operators.projection import Projection, in_eigenbasis, project, random_projection

cases = pytest.mark.parametrize("case", named("llama", "neox", "conv", "repeated", "llama-tied"), ids=lambda case: case.name)


@functools.cache
def gradients(case):
    """The training examples' gradient matrices `[N, O, I]` by definition, one per module."""
    examples = traced(case, "data", "")
    return {name: torch.stack([example[name].w_OI for example in examples]) for name in examples[0]}


def shapes(case):
    return {name: tuple(w_NOI.shape[1:]) for name, w_NOI in gradients(case).items()}


def rows(case, projection, batch_tokens=40):
    """The rows that the engine makes, in the order of the examples."""
    model, task = case.model(), case.task()
    examples = encode(task, case.train())
    sites = cover(model, list(projection.names)).sites
    sink = ProjectedRows(projection, sites, (), "float32", torch.float64, torch.empty(0, dtype=torch.float64))
    step = max(1, batch_tokens // max(examples.sizes))
    batches = [examples.usable[start : start + step] for start in range(0, len(examples.usable), step)]
    with Capture(model, sites, sink.inputs) as capture:
        stream(capture, task, examples.items, batches, likelihood(task, examples), sink, lambda positions: None)
    found = sink.state()
    result = torch.zeros(len(examples), sum(sink.widths.values()), dtype=torch.float64)
    result[found["indices"]] = found["codes"].double()
    return result


def products(case):
    """All inner products of the examples' gradients, `[N, N]`."""
    return torch.stack([w.flatten(1) @ w.flatten(1).T for w in gradients(case).values()]).sum(0)


def noise_of(case, projected):
    """Errors of inner products of projected gradients with themselves, in units of the product of both norms."""
    exact = products(case)
    flat = [torch.cat([g.dense().w_BOI.flatten(1).double() for g in each.values()], 1) for each in projected]
    return (torch.stack([w @ w.T for w in flat]) - exact) / torch.outer(exact.diagonal(), exact.diagonal()).sqrt()


def noise(case, projections):
    """Estimates of `products`, one per projection, in units of the product of both norms."""
    exact = products(case)
    unit = exact.diagonal().sqrt()
    found = []
    for examples, queries in projections:
        sides = [
            torch.cat(
                [
                    project(Dense(w), p.out[name].double(), p.into[name].double()).flatten(1)
                    for name, w in gradients(case).items()
                ],
                1,
            )
            for p in (queries, examples)
        ]
        found.append((sides[0] @ sides[1].T - exact) / torch.outer(unit, unit))
    return torch.stack(found)


@cases
def test_rows_are_the_projected_gradients(case):
    projection = random_projection(shapes(case), 3, seed=1)
    found = rows(case, projection)
    for name, place in projection.places.items():
        m_O, m_I = projection.out[name].double(), projection.into[name].double()
        expected = torch.einsum("op,noi,iq->npq", m_O, gradients(case)[name], m_I).flatten(1)
        torch.testing.assert_close(found[:, place], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@cases
def test_orthogonal_projections_lose_nothing(case):
    def orthogonal(width):
        return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q

    out, into = ({name: orthogonal(shape[side]) for name, shape in shapes(case).items()} for side in (0, 1))
    found = rows(case, Projection(out, into))
    torch.testing.assert_close(found @ found.T, products(case), rtol=1e-5, atol=1e-5 * products(case).abs().max().item())


@pytest.mark.parametrize("case", named("llama", "conv"), ids=lambda case: case.name)
def test_the_mean_over_seeds_is_the_inner_product(case):
    found = noise(case, [(p, p) for p in (random_projection(shapes(case), 3, seed) for seed in range(300))])
    standard_error = found.std(0) / len(found) ** 0.5
    assert (found.mean(0).abs() < 5 * standard_error).all()
    assert found.std() > 0.1  # there was something to average out


def test_more_dimensions_mean_less_noise():
    case = CASES["llama"]
    spread = [
        noise(case, [(p, p) for p in (random_projection(shapes(case), dim, s) for s in range(60))]).std()
        for dim in (1, 2, 4, 8)
    ]
    assert all(later < 0.8 * earlier for earlier, later in zip(spread, spread[1:], strict=False))


@pytest.mark.parametrize("case", named("llama", "conv"), ids=lambda case: case.name)
def test_in_an_eigenbasis_the_mean_is_the_same(case):
    inverse = fit(case.model(), case.task(), case.train(), modules=case.modules).inverse(0.1)
    pairs = [in_eigenbasis(random_projection(shapes(case), 3, seed), inverse) for seed in range(300)]
    found = noise(case, pairs)
    assert (found.mean(0).abs() < 5 * found.std(0) / len(found) ** 0.5).all()
    whole = in_eigenbasis(random_projection(shapes(case), 100, 0), inverse)
    assert noise(case, [whole]).abs().max() < 1e-4


def test_whitening_lessens_the_noise_of_influence():
    case = CASES["llama"]
    inverse = fit(case.model(), case.task(), case.train(), modules=case.modules).inverse(0.1)
    applied = inverse @ {name: Dense(w) for name, w in gradients(case).items()}
    exact = sum(applied[name].w_BOI.flatten(1) @ w.flatten(1).T for name, w in gradients(case).items())

    def spread(pairs):
        estimates = []
        for examples, queries in pairs:
            sides = [
                torch.cat([project(g[n], p.out[n].double(), p.into[n].double()).flatten(1) for n in p.out], 1)
                for p, g in ((queries, applied), (examples, {n: Dense(w) for n, w in gradients(case).items()}))
            ]
            estimates.append(sides[0] @ sides[1].T - exact)
        return torch.stack(estimates).std(0).mean()

    plain = [random_projection(shapes(case), 3, seed) for seed in range(100)]
    assert spread([in_eigenbasis(p, inverse) for p in plain]) < 0.8 * spread([(p, p) for p in plain])


def test_modules_of_one_parent_share_the_projection_of_their_input():
    widths = {"layers.0.mlp.gate": (6, 4), "layers.0.mlp.up": (6, 4), "layers.0.mlp.down": (4, 6), "layers.1.mlp.up": (6, 4)}
    p = random_projection(widths, 2, seed=0)
    assert p.into["layers.0.mlp.gate"] is p.into["layers.0.mlp.up"]
    assert not torch.equal(p.into["layers.0.mlp.up"], p.into["layers.1.mlp.up"])
    assert not torch.equal(p.out["layers.0.mlp.gate"], p.out["layers.0.mlp.up"])
    moved = p.to(torch.empty(0, dtype=torch.float64))
    assert moved.into["layers.0.mlp.gate"] is moved.into["layers.0.mlp.up"]


def gated(monkeypatch):
    """Sites of a model whose gate and up read one input, their projections, and the products taken of whole inputs."""
    case, calls = CASES["llama"], []
    model, task = case.model(), case.task()
    sites = cover(model, "*gate_proj,*up_proj").sites
    matrices = random_projection({name: site.shape for name, site in sites.items()}, 3, seed=0).to(torch.empty(0).double()).into
    products = torch.Tensor.__matmul__
    known = {id(matrix) for matrix in matrices.values()}
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: id(y) in known and calls.append(x.shape) or products(x, y))
    return model, task, encode(task, case.train(2)), sites, matrices, calls


def captured(model, task, examples, sites, matrices):
    found = {}

    class Keep(Sink):
        def receive(self, name, gradient, readers):
            found[name] = gradient

    with Capture(model, sites, matrices) as capture:
        stream(capture, task, examples.items, [[0, 1]], likelihood(task, examples), Keep(), lambda positions: None)
    return found


def test_an_input_is_projected_once_for_all_that_read_it(monkeypatch):
    *given, matrices, calls = gated(monkeypatch)
    captured(*given, matrices)
    assert len(calls) == len(matrices) / 2


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_inputs_are_kept_projected(monkeypatch, reentrant):
    """Also where the model computes its layers again on the way back."""
    model, *given, matrices, _ = gated(monkeypatch)
    whole = captured(model, *given, None)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    found = captured(model, *given, matrices)
    assert set(found) == set(whole)
    for name, gradient in found.items():
        agree(gradient.a_BRI, whole[name].a_BRI @ matrices[name])
        agree(gradient.g_BRO, whole[name].g_BRO)
