"""Steps are those of torch.optim, and adjoints are what autograd gives."""

import pytest
import torch
from oracle import agree

from whence.linalg.descent import Optimizer

KINDS = {
    "sgd": (Optimizer("sgd"), torch.optim.SGD, {}),
    "momentum": (Optimizer("sgd", momentum=0.9, clip=0.5), torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (Optimizer("adamw", betas=(0.8, 0.9), eps=1e-3, clip=0.5), torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-3}),
}
DECAY_P = torch.tensor([0.3, 0.3, 0.0, 0.0], dtype=torch.float64)


def gradients():
    g = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    g[:, 3] = 0  # a weight that nothing moves
    return g


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_torch(kind):
    rule, of, settings = KINDS[kind]
    theta_P = torch.arange(1.0, 5.0).double()
    decayed, free = (part.clone().requires_grad_() for part in theta_P.split(2))
    groups = [{"params": [decayed], "weight_decay": 0.3}, {"params": [free], "weight_decay": 0.0}]
    optimizer, state_XP = of(groups, lr=0.1, **settings), rule.begin(theta_P)
    for number, g_P in enumerate(gradients(), 1):
        decayed.grad, free.grad = (part.clone() for part in g_P.split(2))
        if rule.clip:
            torch.nn.utils.clip_grad_norm_([decayed, free], rule.clip)
        optimizer.step()
        state_XP = rule.step(state_XP, g_P, DECAY_P, 0.1, number)
        torch.testing.assert_close(state_XP[0], torch.cat([decayed, free]).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoints_are_jacobians_transposed(kind):
    rule = KINDS[kind][0]
    state_XP = rule.begin(torch.arange(1.0, 5.0).double())
    for number, g_P in enumerate(gradients()[:2], 1):
        before_XP, state_XP = state_XP, rule.step(state_XP, g_P, DECAY_P, 0.1, number)
    adjoints_QXP = torch.randn(3, *state_XP.shape).double()
    moved = torch.autograd.functional.jacobian(lambda s, g: rule.step(s, g, DECAY_P, 0.1, 2), (before_XP, g_P))
    found = rule.pull(adjoints_QXP, before_XP, g_P, DECAY_P, 0.1, 2)
    for part, jacobian in zip(found, moved, strict=True):
        assert torch.isfinite(part).all()
        agree(part, torch.tensordot(adjoints_QXP, jacobian, 2), 1e-12)


def test_clipping_comes_back_through_the_norm():
    rule, g_P = Optimizer("sgd", clip=1.0), torch.tensor([3.0, 4.0]).double()
    unclipped = Optimizer("sgd").pull(torch.ones(1, 1, 2).double(), torch.zeros(1, 2).double(), g_P, torch.zeros(2), 1.0, 1)[1]
    clipped = rule.pull(torch.ones(1, 1, 2).double(), torch.zeros(1, 2).double(), g_P, torch.zeros(2), 1.0, 1)[1]
    assert (unclipped == -1).all()
    across = (
        torch.tensor([[0.64, -0.48], [-0.48, 0.36]], dtype=torch.float64) / 5
    )  # along the gradient nothing is left of a change
    agree(clipped[0], -across.sum(0), 1e-5)
