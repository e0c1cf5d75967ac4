import pytest
import torch

from whence.selftest import self_test


def test_this_machine_computes():
    assert all(passed for _, passed, _ in self_test())


def test_a_wrong_product_is_noticed(monkeypatch):
    right = torch.linalg.eigh

    def wrong(matrix, *more, **named):
        found = right(matrix, *more, **named)
        return (found[0] * (1 + 1e-6), found[1]) if matrix.shape == (64, 64) else found

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    assert [passed for _, passed, _ in self_test()] == [False, True, True]


def test_an_engine_that_is_wrong_is_noticed(monkeypatch):
    right = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: right(x, w * 1.01 if x.dim() > 1 else w, b))
    assert [passed for _, passed, _ in self_test()] == [True, True, False]


@pytest.mark.gpu
def test_the_gpu_computes():
    assert all(passed for _, passed, _ in self_test("cuda"))
