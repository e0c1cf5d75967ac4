"""Influence with a damped curvature matrix of all tracked weights together, formed and inverted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.coverage import cover
from whence.engine.products import Weights
from whence.engine.stream import drawn_likelihood
from whence.linalg.spectrum import random_vectors
from whence.operators.flat import Flat
from whence.train.record import Training


def hessian(case: Case) -> Tensor:
    """The Hessian of the mean loss, `[P, P]`."""
    return case.hessian_PP


def gauss_newton(case: Case) -> Tensor:
    """The mean of `J^T H J` over the rows, `[P, P]`."""
    return case.gauss_newton_PP


def fisher(case: Case) -> Tensor:
    """The mean of `g g^T`, `g` being gradients with labels that the model draws, one for each prediction."""
    problem = case.problem
    objective = drawn_likelihood(case.task, problem.train, "0:product")

    def gradient(row: int) -> Tensor:
        at = problem.theta.detach().requires_grad_()
        value = problem.at(at, lambda model, batch: objective(model, batch, [row]).sum(), problem.row(row))
        return torch.autograd.grad(value, at)[0]

    g_NP = torch.stack([gradient(row) for row in range(len(case.rows))])
    return g_NP.T @ g_NP / len(g_NP)


def empirical_fisher(case: Case) -> Tensor:
    """The same with the rows' own labels."""
    return case.g_NP.T @ case.g_NP / len(case.g_NP)


MATRICES: dict[str, Callable[[Case], Tensor]] = {
    "hessian": hessian,
    "gauss-newton": gauss_newton,
    "fisher": fisher,
    "empirical-fisher": empirical_fisher,
}


def damping_P(case: Case, damping: float | str, absolute: float | None, mean: float) -> Tensor:
    """What is added to the diagonal: a number, or what the training damped with, of SGD or Adam."""
    one_P = torch.ones_like(case.problem.theta)
    if absolute is not None:
        return absolute * one_P
    if not isinstance(damping, str):
        return damping * mean * one_P
    assert isinstance(case.training, Training)
    about, checkpoint = case.training.about, case.training.checkpoints[-1]
    chosen = about["settings"]
    tokens = about["tokens"]["in_loss_per_epoch"] / about["rows"]["train"]  # the trainer's loss is the mean over tokens
    clipped = np.mean([min(1, chosen["max_grad_norm"] / row["grad_norm"]) for row in case.training.metrics if row["grad_norm"]])
    momentum = float((chosen["arguments"].get("optim_args") or "=0").split("=")[1])
    rates = case.training.learning_rates.sum() / (1 - momentum)
    factor = tokens / float(clipped) * (1 / rates + chosen["weight_decay"])
    moments = checkpoint.second_moments()
    if not moments:
        return factor * one_P
    return factor * ((case.problem.vector(moments) / (1 - 0.999**checkpoint.step)).sqrt() + 1e-8)


def mean_of(matrix_PP: Tensor) -> float:
    """Mean eigenvalue, trace / P."""
    return float(matrix_PP.trace()) / len(matrix_PP)


def formed(case: Case, matrix: str, damping: float | str = 0.1, absolute_damping: float | None = None) -> np.ndarray:
    """`grad m(q)^T (C + lambda)^-1 grad log p(z) / N`, in units of the matrix's own mean eigenvalue."""
    c_PP = MATRICES[matrix](case)
    return solved(case, c_PP, damping_P(case, damping, absolute_damping, mean_of(c_PP)))


def cg(
    case: Case, matrix: str = "gauss-newton", damping: float | str = 0.1, absolute_damping: float | None = None, **_: Any
) -> np.ndarray:
    """The same, in units of the factors' mean eigenvalue; the other settings move how close it is reached."""
    return solved(case, MATRICES[matrix](case), damping_P(case, damping, absolute_damping, case.mean_of_factors))


def solved(case: Case, c_PP: Tensor, lambda_P: Tensor) -> np.ndarray:
    """`grad m(q)^T (C + diag(lambda))^-1 grad log p(z) / N`."""
    return (case.m_QP @ torch.linalg.solve(c_PP + lambda_P.diag(), case.g_NP.T) / len(case.rows)).numpy()


def arnoldi(
    case: Case,
    matrix: str = "gauss-newton",
    top: int = 50,
    complement: bool = True,
    damping: float | str = 0.1,
    absolute_damping: float | None = None,
    **_: Any,
) -> np.ndarray:
    """`m^T (V (S + lambda)^-1 V^T + (I - V V^T) / lambda) g / N` of the `top` eigenpairs; or its first part."""
    scale_P = damping_P(case, damping, absolute_damping, case.mean_of_factors).rsqrt()
    values_P, v_PP = torch.linalg.eigh(MATRICES[matrix](case) * scale_P[:, None] * scale_P)  # where the damping is 1
    keep = values_P.abs().argsort(descending=True)[:top]
    m_QP, g_NP = case.m_QP * scale_P, case.g_NP * scale_P
    m_QK, g_NK = m_QP @ v_PP[:, keep], g_NP @ v_PP[:, keep]
    rest_QN = m_QP @ g_NP.T - m_QK @ g_NK.T if complement else 0.0
    return ((m_QK / (values_P[keep] + 1) @ g_NK.T + rest_QN) / len(case.rows)).numpy()


def nystroem(
    case: Case,
    matrix: str = "gauss-newton",
    rank: int = 64,
    seed: int = 0,
    damping: float | str = 0.1,
    absolute_damping: float | None = None,
) -> np.ndarray:
    """Influence with `(C W) (W^T C W)^-1 (C W)^T` for the matrix `C`, in the metric of the damping, of the same random `W`."""
    lambda_P = damping_P(case, damping, absolute_damping, case.mean_of_factors)
    metric_P = lambda_P if isinstance(damping, str) and absolute_damping is None else torch.ones_like(lambda_P)
    root_P = metric_P.rsqrt()
    c_PP = MATRICES[matrix](case) * root_P[:, None] * root_P
    w_KP = in_order(case, random_vectors(rank, c_PP[0], seed))
    sketch_PP = c_PP @ w_KP.T @ torch.linalg.pinv(w_KP @ c_PP @ w_KP.T, hermitian=True, rtol=1e-13) @ w_KP @ c_PP
    return solved(case, sketch_PP / root_P[:, None] / root_P, lambda_P)


def in_order(case: Case, v_KP: Tensor) -> Tensor:
    """Vectors of the tracked modules, one matrix `[O, I]` after the other, in the order of the problem's weights."""
    sites = cover(case.model, case.modules or case.task.default_modules).sites
    flat = Flat({name: site.shape for name, site in sites.items()})
    parts = {name: each.w_BOI for name, each in flat.gradients(v_KP).items()}
    by_weight = Weights(case.model, sites).spread(parts)
    return torch.cat([by_weight[name].flatten(1) for name in case.problem.shapes], 1)


ORACLES = {kind: functools.partial(formed, matrix=kind) for kind in MATRICES} | {
    "cg": cg,
    "arnoldi": arnoldi,
    "nystroem": nystroem,
}
