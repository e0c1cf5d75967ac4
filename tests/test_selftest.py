import pytest
import torch

from whence.selftest import self_test


def test_this_machine_computes():
    assert all(passed for _, passed, _ in self_test())


def test_a_wrong_product_is_noticed(monkeypatch):
    right = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (right(matrix)[0] * (1 + 1e-6), right(matrix)[1]))
    assert [passed for _, passed, _ in self_test()] == [False, True]


@pytest.mark.gpu
def test_the_gpu_computes():
    assert all(passed for _, passed, _ in self_test("cuda"))
