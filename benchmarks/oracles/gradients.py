"""Methods of gradients alone, and those that take the mean of inverses for the inverse of the mean."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.fitting import fit


def gradient_dot(case: Case) -> np.ndarray:
    """`<grad m(q), grad log p(z)>`."""
    return (case.m_QP @ case.g_NP.T).numpy()


def gradient_cosine(case: Case) -> np.ndarray:
    """`cos(grad m(q), grad log p(z))` (Charpiat et al. 2019, eq. 3)."""
    return (_unit(case.m_QP) @ _unit(case.g_NP).T).numpy()


def relatif(case: Case, damping: float = 0.1, norm: str = "loss") -> np.ndarray:
    """l-RelatIF and theta-RelatIF with a dense EK-FAC (Barshan et al. 2020, section 4); modules without biases."""
    inverse = _ekfac_inverse(case, damping)
    moved_NP = case.g_NP @ inverse
    size_N = moved_NP.norm(dim=1) if norm == "weights" else (moved_NP * case.g_NP).sum(1).sqrt()
    return (case.m_QP @ moved_NP.T / size_N).numpy()


def self_influence(case: Case, damping: float = 0.1) -> np.ndarray:
    """`g_z^T H^-1 g_z / N` for every query alike; modules without biases."""
    own_N = ((case.g_NP @ _ekfac_inverse(case, damping)) * case.g_NP).sum(1) / len(case.rows)
    return own_N.repeat(len(case.queries), 1).numpy()


def gradient_norm(case: Case) -> np.ndarray:
    """`|grad log p(z)|` for every query alike."""
    return case.g_NP.norm(dim=1).repeat(len(case.queries), 1).numpy()


def random(case: Case, seed: int = 0) -> np.ndarray:
    """Draws of a standard normal distribution."""
    return np.random.default_rng(seed).standard_normal((len(case.queries), len(case.rows)))


def datainf(case: Case, damping: float = 0.1) -> np.ndarray:
    """`1/n sum_i (g_i g_i^T + lambda_l)^-1` of each weight l, inverted row by row (Kwon et al. 2024, eq. 5), over N."""
    total = torch.zeros(len(case.queries), len(case.rows)).double()
    for span in case.spans().values():
        g_NP, m_QP = case.g_NP[:, span], case.m_QP[:, span]
        size = damping * g_NP.square().mean() * torch.eye(g_NP.shape[1]).double()
        inverse = torch.stack([torch.linalg.inv(torch.outer(g_P, g_P) + size) for g_P in g_NP]).mean(0)
        total += m_QP @ inverse @ g_NP.T
    return (total / len(case.rows)).numpy()


def _unit(v_KP: Tensor) -> Tensor:
    return v_KP / v_KP.norm(dim=1, keepdim=True)


def _ekfac_inverse(case: Case, damping: float) -> Tensor:
    """The damped inverse of EK-FAC's factors, `[P, P]`."""
    curvature = fit(case.model, case.task, case.rows, method="ekfac", modules=case.modules or case.task.default_modules)
    inverse, total = curvature.inverse(damping), torch.zeros(case.problem.size, case.problem.size).double()
    for name, span in case.spans().items():
        total[span, span] = inverse.blocks[name.removesuffix(".weight")].dense().double()
    return total


ORACLES = {
    "datainf": datainf,
    "gradient-cosine": gradient_cosine,
    "gradient-dot": gradient_dot,
    "gradient-norm": gradient_norm,
    "random": random,
    "relatif": relatif,
    "self-influence": self_influence,
}
