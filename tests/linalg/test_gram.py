import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from whence.linalg.gram import add_gram


@pytest.mark.parametrize("width", [1, 7, 176, 533, 1936])
@pytest.mark.parametrize("operands", [torch.float64, torch.float32])
def test_the_lower_triangle_is_the_gram_matrix(width, operands):
    rows, total = torch.randn(19, width, dtype=operands), torch.randn(width, width, dtype=torch.float64)
    expected = (total + rows.double().T @ rows.double()).tril()
    add_gram(total, rows)
    torch.testing.assert_close(total.tril(), expected, rtol=1e-5 if operands == torch.float32 else 1e-12, atol=1e-5)


def test_wide_matrices_save_almost_half_the_products():
    rows, total = torch.randn(10, 1408), torch.zeros(1408, 1408)
    with FlopCounterMode(display=False) as counter:
        add_gram(total, rows)
    assert counter.get_total_flops() <= 0.6 * 2 * 10 * 1408**2
