"""Damped inverses by steps that see a few rows each, and what they come to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from benchmarks.oracles.curvature import cg, damping_P
from benchmarks.oracles.representations import hidden
from whence.engine.draws import drawn_rows


def lissa(
    case: Case,
    damping: float | str = 0.1,
    absolute_damping: float | None = None,
    depth: int = 1000,
    batch: int = 16,
    scale: float | None = None,
    safety: float = 1.0,
    repeats: int = 1,
    seed: int = 0,
    **_: Any,
) -> np.ndarray:
    """`h_j = v + (I - (G_B + lambda) / sigma) h_{j-1}` from `h_0 = v`, and the mean over the repeats of `h_J / sigma`.

    Koh & Liang (2017), section 3, with scale and damping; of the Gauss-Newton matrix, without a preconditioner.
    """
    v_QP, lambda_P = case.m_QP, damping_P(case, damping, absolute_damping, case.mean_of_factors)

    def product(step: int, h_QP: Tensor) -> Tensor:
        drawn = drawn_rows(range(len(case.rows)), batch, step, seed)
        return replace(case, rows=[case.rows[row] for row in drawn]).problem.gauss_newton(h_QP) + h_QP * lambda_P

    def largest(step: int) -> float:
        x_1P = torch.ones_like(v_QP[:1])
        for _ in range(50):
            x_1P = product(step, x_1P / x_1P.norm())
        return float(x_1P.norm())

    scale, total = scale or safety * max(map(largest, range(3))), torch.zeros_like(v_QP)
    for repeat in range(repeats):
        h_QP = v_QP
        for step in range(repeat * depth, (repeat + 1) * depth):
            h_QP = v_QP + h_QP - product(step, h_QP) / scale
        total += h_QP / scale / repeats
    return (total @ case.g_NP.T / len(case.rows)).numpy()


def fastif(case: Case, candidates: str = "2%", distance: str = "euclidean", **chosen: Any) -> np.ndarray:
    """Of the rows that are among the nearest of any query; NaN for the others, which have no score.

    Guo et al. (2021): `argmin_k |f(q) - f(z)|` (section 3.1), `f` being the mean last hidden state, then LiSSA (section 3.2).
    """
    query_QI, row_NI = (torch.stack([h_TI.mean(0) for h_TI in hidden(case, side)]) for side in (case.queries, case.rows))
    count = float(candidates.strip("%")) * (len(case.rows) / 100 if candidates.endswith("%") else 1)
    far_QN = torch.cdist(query_QI, row_NI)
    if distance == "cosine":
        far_QN = -torch.cosine_similarity(query_QI[:, None], row_NI[None], dim=2)
    order_QN = far_QN.argsort(1)
    left_out = np.setdiff1d(np.arange(len(case.rows)), order_QN[:, : max(1, math.ceil(count))])
    values_QN = lissa(case, **chosen)
    values_QN[:, left_out] = np.nan
    return values_QN


ORACLES = {"lissa": lissa, "astra": cg, "fastif": fastif}
