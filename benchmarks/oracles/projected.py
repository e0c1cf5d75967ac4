"""Methods of projected gradients, with the projections written out as matrices and each inverse formed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.engine.stream import draws
from whence.fitting import fit
from whence.models import load_model
from whence.operators import Operator
from whence.operators.projection import leading_eigenvectors, random_projection
from whence.operators.sketch import masks, sparse_projections
from whence.train.replay import Snapshot


def by_module(case: Case, g_NP: Tensor) -> dict[str, Tensor]:
    """Gradients as the matrix of each module, `[N, O, I]`: a bias is the last column, or the second row of a norm."""
    found: dict[str, list[Tensor]] = {}
    for name, span in case.spans().items():
        module, shape = name.rpartition(".")[0], case.problem.shapes[name]
        part = g_NP[:, span].unflatten(1, shape)
        if type(case.model.get_submodule(module)).__name__ == "Conv1D" and len(shape) == 2:
            part = part.mT
        found.setdefault(module, []).append(part.flatten(2) if part.ndim > 2 else part.unsqueeze(2))
    vectors = {name for name, parts in found.items() if case.model.get_submodule(name).weight.ndim == 1}
    return {name: torch.cat(parts, 2).mT if name in vectors else torch.cat(parts, 2) for name, parts in found.items()}


def shapes(case: Case) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each module."""
    return {name: tuple(w_NOI.shape[1:]) for name, w_NOI in by_module(case, case.m_QP).items()}  # type: ignore[misc]


def written_out(case: Case, operator: Operator) -> dict[str, Tensor]:
    """The matrix `[D, O * I]` of each module, in its columns: what comes of each number alone being one."""
    units = {name: torch.eye(o * i).double().unflatten(1, (o, i)) for name, (o, i) in shapes(case).items()}
    applied = operator.on_tensors(torch.empty(0).double())(units)
    return {name: w_POI.flatten(1).T for name, w_POI in applied.items()}


def projected(case: Case, g_NP: Tensor, operator: Operator) -> dict[str, Tensor]:
    """Projected gradients of each module, `[N, D]`."""
    given, matrices = by_module(case, g_NP), written_out(case, operator)
    return {name: given[name].flatten(1) @ matrix.T for name, matrix in matrices.items()}


def damped(matrix: Tensor, damping: float) -> Tensor:
    """`matrix + damping x mean eigenvalue`."""
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix)).double()


def influence(case: Case, operator: Operator, damping: float, labels: str = "data") -> np.ndarray:
    """`1/N sum_l q^T (1/N sum_n g_n g_n^T + damping)^-1 g` over the modules, the second moments of these labels."""
    rows, queries = projected(case, case.g_NP, operator), projected(case, case.m_QP, operator)
    moments = rows if labels == "data" else projected(case, drawn(case), operator)
    count, total = len(case.rows), torch.zeros(len(case.queries), len(case.rows)).double()
    for name, g_ND in rows.items():
        curvature = damped(moments[name].T @ moments[name] / count, damping)
        total += queries[name] @ torch.linalg.inv(curvature) @ g_ND.T / count
    return total.numpy()


def drawn(case: Case) -> Tensor:
    """Gradients `[N, P]` of the log-likelihood of labels that are drawn for each row from the model."""
    problem, examples, found = case.problem, case.problem.train, []
    for row, item in enumerate(examples.items):
        noise = case.task.collate_noise([item], [draws(case.task, item, examples.ids[row], "0:projected")])
        at = problem.theta.clone().requires_grad_()
        found.append(torch.autograd.grad(-problem.at(at, case.task.losses, problem.row(row), noise).sum(), at)[0])
    return torch.stack(found)


def logra(case: Case, dim: int = 16, damping: float = 0.1, basis: str = "random", labels: str = "data") -> np.ndarray:
    """Influence of `(P_O kron P_I) g` (Choe et al. 2024, section 3.1)."""
    if basis == "curvature":
        curvature = fit(case.model, case.task, case.rows, modules=list(shapes(case)))
        return influence(case, leading_eigenvectors(curvature.blocks, dim), damping, labels)
    return influence(case, random_projection(shapes(case), dim, 0), damping, labels)


def sjlt(case: Case, dim: int = 16, damping: float = 0.1, nonzeros: int = 1, labels: str = "data") -> np.ndarray:
    """Influence of `S g`, `S` sparse (Hu et al. 2025, section 3)."""
    return influence(case, sparse_projections(shapes(case), dim**2, 0, nonzeros), damping, labels)


def factgrass(
    case: Case, dim: int = 16, damping: float = 0.1, nonzeros: int = 1, mask: int = 64, labels: str = "data"
) -> np.ndarray:
    """Influence of `S (M_O kron M_I) g`, `M` masks (Hu et al. 2025, section 3)."""
    masked = masks(shapes(case), mask, 0)
    return influence(case, sparse_projections(masked.sizes, dim**2, 0, nonzeros) @ masked, damping, labels)


def root_of_moments(case: Case, checkpoint: Snapshot, epsilon: float = 1e-8) -> Tensor:
    """`sqrt(v) + epsilon` of each weight, `[P]`."""
    moments = checkpoint.second_moments()
    return torch.cat([moments[name].double().flatten() for name in case.problem.shapes]).sqrt() + epsilon


def trackstar(case: Case, dim: int = 16, damping: float = 0.1, mix: float = 0.5, second_moment: bool = False) -> np.ndarray:
    """Cosine of `R^-1/2 P g / sqrt(v)` of both (Chang et al. 2024, section 3)."""
    operator = random_projection(shapes(case), dim, 0)
    checkpoints = case.training.checkpoints if case.training else []
    scale = root_of_moments(case, checkpoints[-1]) if second_moment else 1.0
    rows, queries = projected(case, case.g_NP / scale, operator), projected(case, case.m_QP / scale, operator)
    size = sum(g.square().sum() for g in rows.values()) / len(case.rows) / sum(q.square().sum() for q in queries.values())
    whitened: tuple[list[Tensor], list[Tensor]] = [], []
    for name, g_ND in rows.items():
        r = (1 - mix) * g_ND.T @ g_ND / len(g_ND) + mix * size * queries[name].T @ queries[name]
        values, vectors = torch.linalg.eigh(damped(r, damping))
        root = vectors @ torch.diag(values**-0.5) @ vectors.T
        for side, vectors_KD in zip(whitened, (queries[name], g_ND), strict=True):
            side.append(vectors_KD @ root)
    q_QD, g_ND = (torch.nn.functional.normalize(torch.cat(side, 1)) for side in whitened)
    return (q_QD @ g_ND.T).numpy()


def margin(case: Case, row: int) -> tuple[Tensor, Tensor]:
    """Gradient `[P]` of `f`, a row's summed log-odds, and its mean `1 - p`; of a number, prediction and residual."""
    at = case.problem.theta.clone().requires_grad_()
    found = case.problem.outputs(at, case.problem.row(row))
    if found.family == "gaussian":
        f, slope = found.h_BTV.sum(), (found.labels - found.h_BTV).sum()
    else:
        counted = found.counted_BT[0]
        p_T = found.h_BTV[0, counted].softmax(-1).gather(1, found.labels[0, counted, None])[:, 0]
        f, slope = (p_T.log() - torch.log1p(-p_T)).sum(), (1 - p_T).mean()
    return torch.autograd.grad(f, at)[0], slope.detach()


def trak(
    case: Case, dim: int = 16, damping: float = 0.1, gram: str = "module", over: str = "model", models: str = ""
) -> np.ndarray:
    """`(1/M sum_m phi (Phi^T Phi)^-1 Phi^T) (1/M sum_m Q)` of margins (Park et al. 2023, eq. 13 to 17)."""
    cases = [case] if over == "model" else [at for _, at in case.at_checkpoints()]
    cases += [replace(case, model=load_model(path)[0]) for path in models.split(",") if path]
    parts, slopes, count = [], [], len(case.rows)
    for number, at in enumerate(cases):
        operator = random_projection(shapes(at), dim, number)
        gradients, one_minus_p = zip(*(margin(at, row) for row in range(count)), strict=True)
        phi, queries = projected(at, torch.stack(gradients), operator), projected(at, at.m_QP, operator)
        if gram == "joint":
            phi, queries = ({"": torch.cat(list(side.values()), 1)} for side in (phi, queries))
        solved = {name: damped(phi_ND.T @ phi_ND / count, damping).inverse() @ phi_ND.T / count for name, phi_ND in phi.items()}
        parts.append(torch.stack([queries[name] @ solved[name] for name in phi]).sum(0))
        slopes.append(torch.stack(one_minus_p))
    return (torch.stack(parts).mean(0) * torch.stack(slopes).mean(0)).numpy()


def less(case: Case, dim: int = 16, epsilon: float = 1e-8) -> np.ndarray:
    """`sum_t eta_t cos(P m, P g / (sqrt(v) + epsilon))` (Xia et al. 2024, definition 3.1)."""
    total, before = torch.zeros(len(case.queries), len(case.rows)).double(), 0
    for checkpoint, at in case.at_checkpoints():
        operator = random_projection(shapes(at), dim, 0)
        updates = projected(at, at.g_NP / root_of_moments(at, checkpoint, epsilon), operator)
        queries = projected(at, at.m_QP, operator)
        q_QD, g_ND = (torch.nn.functional.normalize(torch.cat(list(side.values()), 1)) for side in (queries, updates))
        total += case.training.learning_rates[before : checkpoint.step].mean() * q_QD @ g_ND.T
        before = checkpoint.step
    return total.numpy()


ORACLES = {"logra": logra, "sjlt": sjlt, "factgrass": factgrass, "trackstar": trackstar, "trak": trak, "less": less}
