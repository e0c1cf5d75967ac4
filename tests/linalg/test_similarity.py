"""Cosines and centred kernel alignment, against their definitions; what alignment does not see."""

import torch

from whence.linalg.similarity import cosines, distances, linear_cka, masked_mean


def test_vectors():
    x, y = torch.randn(3, 5).double(), torch.randn(4, 5).double()
    y[1] = 0
    torch.testing.assert_close(cosines(x, y)[2, 3], torch.nn.functional.cosine_similarity(x[2], y[3], 0))
    assert not cosines(x, y)[:, 1].any()
    torch.testing.assert_close(distances(x, y)[2, 3], (x[2] - y[3]).norm())


def test_padding_changes_nothing():
    y, real = torch.randn(2, 6, 5).double(), torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(masked_mean(y, real), torch.stack([y[0, :3].mean(0), y[1, 1:].mean(0)]))
    x = [torch.randn(4, 5).double(), torch.randn(7, 5).double()]
    every = torch.ones(1, 1).bool()
    alone = torch.cat([linear_cka(x, y[:1, :3], every.expand(1, 3)), linear_cka(x, y[1:, 1:], every.expand(1, 5))], 1)
    torch.testing.assert_close(linear_cka(x, y, real), alone)


def test_alignment_is_one_of_a_text_with_itself_in_any_order_and_size():
    x = torch.randn(4, 9).double()
    y = torch.stack([x, 3 * x[[2, 0, 3, 1]]])
    torch.testing.assert_close(linear_cka([x], y, torch.ones(2, 4).bool()), torch.ones(1, 2).double())
    assert not linear_cka([x], torch.ones(1, 4, 9).double(), torch.ones(1, 4).bool()).any()
