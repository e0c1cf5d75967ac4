"""Influence with block-diagonal curvatures in Kronecker-factored bases, of modules whose weight is a matrix.

`R` positions of a row, `O` outputs, `I` inputs with a bias as the last one, `N` rows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.oracles.base import Case
from benchmarks.oracles.curvature import damping_P, in_order
from whence.coverage import cover
from whence.engine.stream import drawn_likelihood
from whence.fitting.fit import draw_samples
from whence.settings import Fit


@dataclass(frozen=True)
class Pair:
    """One row at one module: its gradient is `g_RO^T a_RI`; `reads` tells which tensor it read."""

    g_RO: Tensor
    a_RI: Tensor
    reads: int

    @property
    def w_OI(self) -> Tensor:
        """The gradient."""
        return self.g_RO.T @ self.a_RI


Pairs = Mapping[str, Pair]
"""Of one row, by module."""


def pairs(case: Case, purpose: str, rows: Sequence[int]) -> list[Pairs]:
    """What each row's log-likelihood with labels that the model draws for a pass makes of each module."""
    names = cover(case.model, case.modules or case.task.default_modules).sites
    model, problem = copy.deepcopy(case.model).double().requires_grad_(True), case.problem
    objective = drawn_likelihood(case.task, problem.train, f"0:{purpose}")
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        return lambda module, args, output: calls.update({name: (args[0], output)})

    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in names]
    found = []
    for row in rows:
        value = objective(model, problem.row(row), [row]).sum()
        gradients = torch.autograd.grad(value, [output for _, output in calls.values()])
        given = zip(calls.items(), gradients, strict=True)
        found.append({name: pair(model.get_submodule(name), x, g) for (name, (x, _)), g in given})
    for handle in handles:
        handle.remove()
    return found


def pair(module: nn.Module, x: Tensor, g: Tensor) -> Pair:
    """The two sides, with a column of ones for the bias."""
    a_RI = x.detach().flatten(0, -2)
    ones = a_RI.new_ones(len(a_RI), int(getattr(module, "bias", None) is not None))
    return Pair(g.flatten(0, -2), torch.cat([a_RI, ones], 1), id(x))


def sides_by_position(name: str, rows: Sequence[Pairs]) -> tuple[Tensor, Tensor, float]:
    """Means of `g g^T` and `a a^T` over positions that the loss reaches, and their number per row (Martens & Grosse 2015)."""
    g, a = [], []
    for row in rows:
        alike = [other.g_RO for other in row.values() if other.reads == row[name].reads]
        g.append(row[name].g_RO[(row[name].g_RO != 0).any(1)])
        a.append(row[name].a_RI[torch.cat(alike, 1).any(1)])
    g_RO, a_RI = torch.cat(g), torch.cat(a)
    return g_RO.T @ g_RO / len(g_RO), a_RI.T @ a_RI / len(a_RI), len(g_RO) / len(rows)


def sides_by_row(name: str, rows: Sequence[Pairs]) -> tuple[Tensor, Tensor, float]:
    """Means of `w w^T` and `w^T w`, `w` being rows' gradients (Gupta et al. 2018)."""
    w_NOI = torch.stack([row[name].w_OI for row in rows])
    return (w_NOI @ w_NOI.mT).mean(0), (w_NOI.mT @ w_NOI).mean(0), 1.0


def influence(case: Case, method: str, damping: float | str = 0.1, absolute_damping: float | None = None) -> np.ndarray:
    """`grad m(q)^T (G + lambda)^-1 grad log p(z) / N`, `G` having eigenvalues `[O, I]` in the bases of each module's sides."""
    examples = case.problem.train
    widest = max(max(site.shape) for site in cover(case.model, case.modules or case.task.default_modules).sites.values())
    first, second = draw_samples(examples, Fit(method=method), widest)  # type: ignore[arg-type]
    covariance, measured = pairs(case, "covariance", first), pairs(case, "eigenvalues", second)
    shapes = {name: one.w_OI.shape for name, one in measured[0].items()}
    metric = damping_of(case, damping, absolute_damping, shapes)
    queries, rows = ({name: split(case, v_KP, shapes)[name] for name in shapes} for v_KP in (case.m_QP, case.g_NP))
    total = 0.0
    for name, shape in shapes.items():
        q_O, q_I, lam_OI = torch.eye(shape[0]).double(), torch.eye(shape[1]).double(), torch.empty(shape).double()
        if method != "diagonal":
            by = sides_by_row if method == "shampoo" else sides_by_position
            out, into, count = by(name, covariance)
            (s_O, q_O), (s_I, q_I) = torch.linalg.eigh(out), torch.linalg.eigh(into)
            lam_OI = count * torch.outer(s_O, s_I)
        if method != "kfac":
            lam_OI = torch.stack([(q_O.T @ row[name].w_OI @ q_I).square() for row in measured]).mean(0)
            if method != "diagonal":
                lam_OI = levelled(levelled(lam_OI, s_O).T, s_I).T
        if metric is None:
            damped_OI = lam_OI + float(damping) * lam_OI.mean()
        else:
            damped_OI = lam_OI + q_O.square().T @ metric[name] @ q_I.square()
        m_QOI, g_NOI = q_O.T @ queries[name] @ q_I, q_O.T @ rows[name] @ q_I
        total = total + (m_QOI / damped_OI).flatten(1) @ g_NOI.flatten(1).T
    return (total / len(case.rows)).numpy()  # type: ignore[union-attr]


def levelled(lam_XY: Tensor, values_X: Tensor) -> Tensor:
    """Eigenvalues with their mean where a side has none: its basis is anybody's choice there."""
    unseen = values_X <= 1e-13 * len(values_X) * values_X.max()
    return torch.where(unseen[:, None], lam_XY[unseen].mean(0), lam_XY) if unseen.any() else lam_XY


def damping_of(
    case: Case, damping: float | str, absolute: float | None, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor] | None:
    """A number for each weight; None where each module has a share of its own mean eigenvalue."""
    if absolute is None and not isinstance(damping, str):
        return None
    lambda_P = damping_P(case, damping, absolute, 0.0)
    return {name: part[0] for name, part in split(case, lambda_P[None], shapes).items()}


def split(case: Case, v_KP: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Vectors in the order of the problem's weights as matrices `[K, O, I]` by module."""
    size = v_KP.shape[1]
    place_P = in_order(case, torch.arange(size).double()[None])[0].long()  # where each weight of the problem stands in them
    ordered_KP = torch.empty_like(v_KP)
    ordered_KP[:, place_P] = v_KP
    parts = ordered_KP.split([shape.numel() for shape in shapes.values()], 1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


ORACLES = {method: functools.partial(influence, method=method) for method in ("ekfac", "kfac", "shampoo", "diagonal")}
