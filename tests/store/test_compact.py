import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from whence.store.compact import compact, expand


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_a_matrix_takes_three_bytes_a_number_and_is_rounded_to_the_nearest(scale):
    matrix = torch.randn(7, 33) * scale
    packed = compact({"m": matrix})["m"]
    assert packed.nbytes == 3 * matrix.numel()
    found = expand({"m": packed})["m"]
    assert found.dtype == torch.float32 and found.shape == matrix.shape
    error = ((found - matrix).double() / matrix.double()).abs()
    assert 0 < error.max() <= 2.0**-16
    assert torch.equal(expand(compact({"m": found}))["m"], found), "what was rounded stays as it is"


def test_a_transposed_matrix_and_zeros():
    matrix = torch.randn(5, 4).T
    assert torch.allclose(expand(compact({"m": matrix}))["m"], matrix, rtol=2.0**-15)
    zeros = torch.tensor([[0.0, -0.0, 1.0, -2.0]])
    assert torch.equal(expand(compact({"m": zeros}))["m"], zeros)


def test_everything_else_is_left_alone():
    others = {"wide": torch.randn(3, 3, dtype=torch.float64), "vector": torch.randn(5), "count": torch.tensor(3)}
    assert all(torch.equal(found, others[name]) for name, found in expand(compact(others)).items())


def test_a_matrix_without_numbers_takes_no_memory():
    with FakeTensorMode():
        packed = compact({"m": torch.empty(10**6, 10**6)})
        assert packed["m"].shape == (10**6, 10**6, 3) and packed["m"].dtype == torch.uint8
        assert expand(packed)["m"].shape == (10**6, 10**6)
