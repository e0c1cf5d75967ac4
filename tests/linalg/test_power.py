"""The ends of a spectrum against a dense decomposition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whence.errors import NumericalError
from whence.linalg.power import spectrum_ends


def symmetric(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (q * values) @ q.T


def as_map(matrix):
    """Of two parts, as the weights of two modules are."""

    def product(x):
        cut = x["a"].shape[1]
        moved = torch.cat([x["a"], x["b"]], 1) @ matrix
        return {"a": moved[:, :cut], "b": moved[:, cut:]}

    return product


def block(size, count=1):
    return {"a": torch.zeros(count, 3, dtype=torch.float64), "b": torch.zeros(count, size - 3, dtype=torch.float64)}


@given(st.integers(0, 1000))
def test_it_is_below_the_largest_eigenvalue_and_the_bound_above(seed):
    values = torch.rand(60, generator=torch.Generator().manual_seed(seed)).double() ** 4
    few = spectrum_ends(as_map(symmetric(values)), block(60), steps=12, seed=seed)
    assert 0.8 * values.max() < few.largest <= values.max() * (1 + 1e-9) and few.smallest >= values.min() - 1e-9
    assert values.max() < few.bound < 2 * values.max()


def test_all_steps_find_it_exactly():
    matrix = symmetric(torch.linspace(-1, 3, 12))
    ends = spectrum_ends(as_map(matrix), block(12, count=4), steps=40)
    assert ends.largest == pytest.approx(3, rel=1e-8) and ends.smallest == pytest.approx(-1, rel=1e-8)
    assert ends.bound == ends.largest
    one = spectrum_ends(lambda x: {name: 2 * part for name, part in x.items()}, block(12), steps=10)
    assert one.largest == one.smallest == pytest.approx(2) and one.steps == 1, "one product tells all of a multiple of 1"


def test_a_preconditioner_makes_it_that_of_the_product():
    matrix, near = symmetric(torch.linspace(0.1, 5, 12)), symmetric(torch.linspace(0.2, 1, 12), seed=1)
    exact = torch.linalg.eigvals(near @ matrix).real
    ends = spectrum_ends(as_map(matrix), block(12), as_map(near), steps=12)
    assert ends.largest == pytest.approx(float(exact.max()), rel=1e-8)
    assert ends.smallest == pytest.approx(float(exact.min()), rel=1e-6)


def test_too_few_steps_bound_nothing_and_what_is_not_finite_raises():
    assert spectrum_ends(as_map(symmetric(torch.ones(60))), block(60), steps=1).bound == math.inf
    with pytest.raises(NumericalError, match="not finite"):
        spectrum_ends(lambda x: {name: part * math.inf for name, part in x.items()}, block(12))
