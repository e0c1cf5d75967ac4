"""Results whose rows begin on cache lines: the same numbers, in a layout that only concerns float32 on a CPU."""

import pytest
import torch

from whence.linalg.aligned import LINE, aligned, product, zeros
from whence.linalg.gram import add_gram
from whence.precision import multiplying

CPU = torch.device("cpu")
SHAPES = [((6, 300), (300, 257)), ((2, 3, 6, 300), (300, 257)), ((6, 300), (2, 300, 257))]


@pytest.mark.parametrize("left, right", SHAPES)
def test_product_is_the_product(left, right):
    torch.manual_seed(0)
    a, b = torch.randn(left), torch.randn(right)
    found = product(a, b)
    torch.testing.assert_close(found, a @ b)
    assert found.stride(-1) == 1
    assert found.stride(-2) == 272


@pytest.mark.parametrize(
    "width, dtype", [(256, torch.float32), (65, torch.float32), (257, torch.float64), (257, torch.bfloat16)]
)
def test_what_gains_nothing_lies_as_ever(width, dtype):
    a, b = torch.randn(4, 8).to(dtype), torch.randn(8, width).to(dtype)
    assert product(a, b).is_contiguous()
    assert zeros(4, width, dtype=dtype, device=CPU).is_contiguous()
    assert aligned(b) is b


def test_short_products_stay_short():
    torch.manual_seed(0)
    a, b = torch.randn(400, 300), torch.randn(300, 257)
    with multiplying("bfloat16", CPU):
        found, as_ever = product(a, b), a @ b
    assert torch.equal(found, as_ever)


def test_sums_that_go_on_from_a_copy_are_the_same_to_the_last_bit():
    torch.manual_seed(0)
    first, second = torch.randn(2, 500, 1025)
    whole = zeros(1025, 1025, dtype=torch.float32, device=CPU)
    add_gram(whole, first)
    saved = aligned(whole.contiguous())
    assert saved.stride() == whole.stride()
    assert saved.stride(0) % LINE == 0
    for total in (whole, saved):
        add_gram(total, second)
    assert torch.equal(saved.tril(), whole.tril())


@pytest.mark.parametrize("shape", [(), (300,), (0, 257), (3, 0)])
def test_any_shape(shape):
    found = zeros(*shape, dtype=torch.float32, device=CPU)
    assert found.shape == shape
    assert not found.any()
    assert torch.equal(aligned(found), found)
