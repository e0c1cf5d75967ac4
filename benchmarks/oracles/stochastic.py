"""Damped inverses by steps that see a few rows each, and what they come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.engine.draws import drawn_rows


def lissa(
    case: Case,
    *,
    scale: float,
    depth: int,
    absolute_damping: float | None = None,
    damping: float = 0.1,
    batch: int = 32,
    repeats: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """`h_j = v + (I - (H_B + lambda) / sigma) h_{j-1}` from `h_0 = v`, and `h_J / sigma`, the mean of the repeats.

    Koh & Liang (2017), section 3, with scale and damping; plain, of the Gauss-Newton matrix.
    """
    count, v_QP, total = len(case.rows), case.m_QP, torch.zeros_like(case.m_QP)
    rows_NPP = [replace(case, rows=[row]).gauss_newton_PP for row in case.rows]
    damped_PP = absolute(case, damping, absolute_damping) * torch.eye(v_QP.shape[1]).double()
    for repeat in range(repeats):
        h_QP = v_QP
        for step in range(repeat * depth, (repeat + 1) * depth):
            drawn = drawn_rows(range(count), batch, step, seed)
            h_QP = v_QP + h_QP - h_QP @ (sum(rows_NPP[row] for row in drawn) / len(drawn) + damped_PP) / scale
        total += h_QP / scale / repeats
    return (total @ case.g_NP.T / count).numpy()


def converged(case: Case, *, damping: float = 0.1, absolute_damping: float | None = None, **steps: Any) -> np.ndarray:
    """`(G + lambda)^-1`, which the steps come to however they go (Wang et al. 2025; Guo et al. 2021, equation 4)."""
    return inverted(case, case.gauss_newton_PP, absolute(case, damping, absolute_damping))


def inverted(case: Case, matrix_PP: Tensor, number: float) -> np.ndarray:
    """Values with a damped inverse."""
    damped_PP = matrix_PP + number * torch.eye(len(matrix_PP)).double()
    return (torch.linalg.solve(damped_PP, case.m_QP.T).T @ case.g_NP.T / len(case.rows)).numpy()


def absolute(case: Case, damping: float, number: float | None) -> float:
    """The damping as a number: a share of the exact mean eigenvalue, where it is not one."""
    return damping * float(case.gauss_newton_PP.trace()) / case.problem.size if number is None else number


ORACLES = {"lissa": lissa, "astra": converged}
