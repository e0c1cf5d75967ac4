"""What a step of an optimizer does to all weights at once, and what comes back through it.

`P` weights. A state `[X, P]` has the weights first, and then what the optimizer remembers: nothing, a velocity, or AdamW's two
moments. `Q` adjoints of a state, `[Q, X, P]`, are derivatives of `Q` numbers with respect to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap

CLIPPING_EPS = 1e-6
"""What torch adds to a norm before it clips by it."""


@dataclass(frozen=True)
class Optimizer:
    """SGD with momentum (0: none), or AdamW (Loshchilov & Hutter 2019); the operations are those of torch.optim.

    `clip` is the norm at which a step's gradient is cut off, 0 for never.
    """

    kind: Literal["sgd", "adamw"]
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0

    def begin(self, theta_P: Tensor) -> Tensor:
        """The state before the first step, `[X, P]`."""
        remembered = 2 if self.kind == "adamw" else int(self.momentum > 0)
        return torch.cat([theta_P[None], theta_P.new_zeros(remembered, len(theta_P))])

    def step(self, state_XP: Tensor, g_P: Tensor, decay_P: Tensor, rate: float, number: int) -> Tensor:
        """The state after step `number` (counted from 1) along the gradient; weight decay is decoupled for AdamW only."""
        g_P, theta_P = self._clipped(g_P), state_XP[0]
        if self.kind == "sgd":
            g_P = g_P + decay_P * theta_P
            if not self.momentum:
                return (theta_P - rate * g_P)[None]
            velocity_P = self.momentum * state_XP[1] + g_P
            return torch.stack([theta_P - rate * velocity_P, velocity_P])
        beta1, beta2 = self.betas
        m_P = state_XP[1] + (1 - beta1) * (g_P - state_XP[1])
        v_P = beta2 * state_XP[2] + (1 - beta2) * g_P.square()
        moved_P = m_P / (_root(v_P) / math.sqrt(1 - beta2**number) + self.eps)
        return torch.stack([theta_P * (1 - rate * decay_P) - rate / (1 - beta1**number) * moved_P, m_P, v_P])

    def pull(
        self, adjoints_QXP: Tensor, state_XP: Tensor, g_P: Tensor, decay_P: Tensor, rate: float, number: int
    ) -> tuple[Tensor, Tensor]:
        """Adjoints of the state before the step, `[Q, X, P]`, the gradient held fixed, and of the gradient, `[Q, P]`."""
        back = vjp(lambda state_XP, g_P: self.step(state_XP, g_P, decay_P, rate, number), state_XP, g_P)[1]
        return vmap(back)(adjoints_QXP)

    def _clipped(self, g_P: Tensor) -> Tensor:
        if not self.clip:
            return g_P
        return g_P * (self.clip / (torch.linalg.vector_norm(g_P) + CLIPPING_EPS)).clamp(max=1)


def _root(v_P: Tensor) -> Tensor:
    """The square root, whose slope at 0 is taken for 0: a weight that no row moves has no say in anything."""
    moved = v_P > 0
    return torch.where(moved, torch.where(moved, v_P, 1).sqrt(), 0)


def caught_up(x: Tensor) -> Tensor:
    """`(1 - e^-x) / x`, the mean of `e^-t` up to `x`: how much of a pull that lasts is left once it decays at a rate of `x`."""
    safe = torch.where(x.abs() < torch.finfo(x.dtype).tiny, 1.0, x)
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 1.0, -torch.expm1(-safe) / safe)
