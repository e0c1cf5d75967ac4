"""Products of rounded operands: which are taken, what they are, and where they reach."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import CASES

from whence import casting, precision
from whence.casting import RoundedOperands
from whence.cost import worth_rounding
from whence.engine.probe import agreement
from whence.fitting import fit
from whence.fitting.covariance import Covariance
from whence.precision import Precision, multiplying
from whence.scoring import score

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_matrix_units(monkeypatch):
    monkeypatch.setattr(precision, "_rounds_before", lambda device: True)


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def short(x):
    """What is left of the numbers."""
    return x.bfloat16().double()


A, B, STACK, BIAS = matrix(200, 128), matrix(128, 160, seed=1), matrix(3, 200, 128, seed=2), matrix(160, seed=3)

PRODUCTS = {
    "matmul operator": (lambda: A @ B, lambda: short(A) @ short(B)),
    "matmul": (lambda: torch.matmul(STACK, B), lambda: short(STACK) @ short(B)),
    "method": (lambda: A.matmul(B), lambda: short(A) @ short(B)),
    "mm": (lambda: torch.mm(A, B), lambda: short(A) @ short(B)),
    "bmm": (lambda: torch.bmm(STACK, STACK.mT), lambda: short(STACK) @ short(STACK).mT),
    "linear": (lambda: F.linear(STACK, B.T, BIAS), lambda: short(STACK) @ short(B) + BIAS.double()),
    "linear without bias": (lambda: F.linear(A, B.T), lambda: short(A) @ short(B)),
    "addmm": (lambda: torch.addmm(BIAS, A, B), lambda: short(A) @ short(B) + BIAS.double()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_operands_are_rounded_and_results_float32(name):
    product, expected = PRODUCTS[name]
    whole = product()
    with RoundedOperands():
        found = product()
    assert found.dtype == torch.float32 and not torch.equal(found, whole)
    assert torch.allclose(found.double(), expected(), rtol=2**-7, atol=1e-2)  # the result is rounded once, too
    assert (found - expected()).norm() < 2**-8 * expected().norm()


@pytest.mark.parametrize(
    "product",
    [
        lambda: A[:, :8] @ B[:8],  # too small to be worth it
        lambda: A.double() @ B.double(),
        lambda: A.bfloat16() @ B.bfloat16(),
        lambda: A @ B[:, 0],
        lambda: torch.addmm(BIAS, A, B, beta=0.5),
        lambda: F.linear(A, torch.nn.Parameter(B.T)),  # a weight that asks for its gradient
        lambda: A.clone().requires_grad_() @ B,
        lambda: torch.einsum("bi,io->bo", A, B),
        lambda: F.scaled_dot_product_attention(STACK, STACK, STACK),
    ],
)
def test_others_are_the_same_to_the_bit(product):
    expected = product()
    with RoundedOperands():
        assert torch.equal(product(), expected)


@pytest.mark.parametrize("layer", [lambda x: F.linear(x, B.T, BIAS), lambda x: torch.addmm(BIAS, x, B)])
def test_a_linear_layer_rounds_on_the_way_back_too(layer):
    x, upstream = A.clone().requires_grad_(), matrix(200, 160, seed=4)
    with RoundedOperands():
        y = layer(x)
    (found,) = torch.autograd.grad(y, x, upstream)
    expected = short(upstream) @ short(B).T
    assert found.dtype == torch.float32 and (found - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.parametrize(("width", "is_short"), [(128, True), (8, False)])
def test_a_covariance_is_that_of_rounded_rows(width, is_short):
    rows = A[:, :width]
    sink = Covariance({}, "kfac", operands=torch.float32, sums=torch.float32, device=CPU)
    with multiplying("bfloat16", CPU):
        sink._add_blocks("in/layer", rows)
    found, whole, expected = sink.sums["in/layer/0"].tril(), (rows.T @ rows).tril(), (short(rows).T @ short(rows)).tril()
    assert (found - expected).norm() < 2**-8 * expected.norm() if is_short else torch.allclose(found, whole)
    assert torch.allclose(found, whole, rtol=1e-5) != is_short


def test_worth_it_are_products_whose_numbers_are_used_often():
    assert worth_rounding(2032, 256, 704) and worth_rounding(127, 704, 256)
    assert not worth_rounding(16, 180_000, 16) and not worth_rounding(2032, 704, 16)


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_fit_and_its_scores_hardly_move(name, again, monkeypatch):
    """Everything is worth it here, also where the model computes its layers again on the way back."""
    case, rounded = CASES[name], []
    model, task, train = case.model().float(), case.task(), case.train(12)
    if again:
        model.activation_checkpointing_enable()
    operands = casting.short
    monkeypatch.setattr(casting, "worth_rounding", lambda *shape: True)
    monkeypatch.setattr(casting, "short", lambda x: rounded.append(tuple(x.shape)) or operands(x))

    def found(products):
        settings = Precision(products=products)
        curvature = fit(model, task, train, modules="all", labels="data", precision=settings)
        return torch.from_numpy(score(model, task, case.queries(), train, curvature.inverse(), precision=settings).raw)

    whole = found("float32")
    assert not rounded
    seen = agreement(found("bfloat16"), whole)
    assert 0 < seen.error < 0.1 and seen.pearson > 0.99
    shapes = {tuple(block.shape) for block in model.parameters() if block.ndim == 2}
    assert {shape for shape in rounded if len(shape) == 2} & (shapes | {shape[::-1] for shape in shapes})


def test_hooks_multiply_as_their_surroundings_do(monkeypatch):
    """torch calls them without its modes."""
    seen, case = [], CASES["llama"]
    monkeypatch.setattr(casting, "worth_rounding", lambda *shape: seen.append(shape) or False)
    model, train = case.model().float(), case.train(3)
    fit(model, case.task(), train, method="diagonal", modules="all", precision=Precision(products="bfloat16"))
    formed = {(site.out_features, site.in_features) for site in model.modules() if isinstance(site, torch.nn.Linear)}
    assert formed & {(rows, columns) for rows, _, columns in seen}


SHAPES = """
import ctypes, gc, os, pathlib, torch
from whence.precision import multiplying

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

weight = torch.randn(256, 256)
with multiplying("bfloat16", torch.device("cpu")):
    torch.randn(300, 256) @ weight
    before = resident()
    for rows in range(301, 701):
        torch.randn(rows, 256) @ weight
    print(resident() - before)
"""


@pytest.mark.skipif(not precision._rounds_before(torch.device("cpu")), reason="no AVX512-BF16")
def test_short_products_of_ever_new_shapes_do_not_pile_up():
    unset = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    megabytes, piled_up = (
        float(subprocess.run([sys.executable, "-c", SHAPES], env=given, capture_output=True, check=True, text=True).stdout)
        for given in (unset, unset | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"})
    )
    assert megabytes < 40 < piled_up
