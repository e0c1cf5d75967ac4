"""A matrix over all modules by its eigenvectors, and operators under other names, are what dense matrices say."""

import pytest
import torch
from oracle import agree

from whence.errors import NumericalError
from whence.gradients import Dense
from whence.operators import BlockDiagonal, EigenBlock, Identity, Renamed, Spectral
from whence.operators.flat import Flat

SHAPES = {"a": (2, 3), "b": (1, 4)}
FLAT = Flat(SHAPES)


def matrix():
    root = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T / 10


def gradients(seed=1, names=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    return {name: Dense(torch.randn(3, *SHAPES[name], generator=generator, dtype=torch.float64)) for name in names}


def test_functions_of_a_matrix():
    operator, given = Spectral.of(matrix(), SHAPES, "matrix"), gradients()
    v_KP = FLAT.vectors(given)
    agree(operator.dense(), matrix(), 1e-12)
    agree(FLAT.vectors(operator @ given), v_KP @ matrix(), 1e-12)
    decay = operator.apply(lambda lam: torch.exp(-lam))
    agree(FLAT.vectors(decay @ given), v_KP @ torch.matrix_exp(-matrix()), 1e-12)
    mean = matrix().trace() / 10
    for damping, how in ((0.2 * mean, {"damping": 0.2}), (0.3, {"absolute": 0.3})):
        inverse = torch.linalg.inv(matrix() + damping * torch.eye(10, dtype=torch.float64))
        agree(FLAT.vectors(operator.inverse(**how) @ given), v_KP @ inverse, 1e-12)
    with pytest.raises(NumericalError, match="can't be inverted"):
        operator.apply(lambda lam: -lam).inverse(absolute=0.0)


def test_some_modules_of_it():
    """Gradients that are not given are zero; `only` holds the other modules still; `between` scales each weight."""
    operator = Spectral.of(matrix(), SHAPES)
    found = operator @ gradients(names=("b",))
    for name, columns in (("a", slice(6)), ("b", slice(6, None))):
        expected = gradients(names=("b",))["b"].w_BOI.flatten(1) @ matrix()[6:, columns]
        agree(found[name].dense().w_BOI.flatten(1), expected, 1e-12)
    assert operator.only(("b",)).names == ("b",) and operator.only(("b", "a")) is operator
    agree(operator.only(("b",)).dense(), matrix()[6:, 6:], 1e-12)
    sizes = {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    scale_P = torch.cat([sizes["a"].flatten(), sizes["b"].flatten()])
    diagonal = BlockDiagonal({name: EigenBlock(None, None, each) for name, each in sizes.items()})
    agree(operator.between(diagonal).dense(), scale_P[:, None] * matrix() * scale_P, 1e-12)


def test_an_operator_under_other_names():
    """Modules without a name there are left out, whether the operator is applied to all at once or as gradients arise."""
    inner = BlockDiagonal(
        {
            "a": EigenBlock(None, None, torch.full(SHAPES["a"], 2.0).double()),
            "b": EigenBlock(None, None, torch.ones(SHAPES["b"])),
        }
    )
    operator = Renamed(inner, {"x": "a", "y": "c"})
    given = {"x": gradients()["a"], "b": gradients()["b"]}
    assert operator.names == operator.reads == ("x",) and operator.blockwise
    agree((operator @ given)["x"].dense().w_BOI, 2 * given["x"].w_BOI, 0)
    assert set(operator @ given) == {"x"}
    streaming = operator.streaming(torch.empty(0, dtype=torch.float64))
    agree(streaming.apply("x", given["x"], ("x", "b")).dense().w_BOI, 2 * given["x"].w_BOI, 0)
    agree(streaming.quadratic("x", given["x"], ("x",)), 2 * given["x"].w_BOI.square().sum((1, 2)), 1e-12)
    assert operator.identity() != Renamed(inner, {"z": "a"}).identity()
    assert set(Renamed(Identity(), {"x": "a"}) @ given) == {"x"}


def test_a_product_reads_what_its_right_side_does():
    whole, part = Spectral.of(matrix(), SHAPES), BlockDiagonal({"a": EigenBlock(None, None, torch.ones(SHAPES["a"]).double())})
    product = part @ whole
    assert product.names == ("a",) and product.reads == ("a", "b") and (part @ part).reads == ("a",)
    agree((product @ gradients())["a"].dense().w_BOI.flatten(1), (FLAT.vectors(gradients()) @ matrix())[:, :6], 1e-12)
