"""Checks that this machine computes correctly, in seconds."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from whence.fitting import fit
from whence.progress import Silent, report_to
from whence.scoring import score
from whence.tasks import Regression


def self_test(device: str | torch.device = "cpu") -> list[tuple[str, bool, str]]:
    """Run every check on a device: its name, whether it passed, and what was measured."""
    return [check(torch.device(device)) for check in (_eigh, _low_precision_product, _scores)]


def _eigh(device: torch.device) -> tuple[str, bool, str]:
    """Rebuild a float64 covariance from its eigenvectors and eigenvalues."""
    x = torch.randn(96, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    covariance = x.T @ x
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    error = ((vectors * eigenvalues) @ vectors.T - covariance).norm() / covariance.norm()
    return "float64 eigendecomposition", bool(error < 1e-12), f"relative error {error:.1e}"


def _low_precision_product(device: torch.device) -> tuple[str, bool, str]:
    """Multiply bfloat16 matrices whose sums bfloat16 could not hold: a float32 accumulator gets them right."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    exact = a.float() @ b.float()
    error = ((a @ b).float() - exact).norm() / exact.norm()
    return "bfloat16 product against float32", bool(error < 2**-8), f"relative error {error:.1e}"


ROWS, QUERIES, DAMPING = 24, 3, 0.1


def _scores(device: torch.device) -> tuple[str, bool, str]:
    """Fit and score a small network as a run does, and by the formula: dense matrices in float64, a gradient at a time."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    with torch.no_grad():
        for w_OI in model.parameters():
            w_OI.copy_(torch.randn(w_OI.shape, generator=generator) / w_OI.shape[1] ** 0.5)
    rows = list(zip(torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 2, generator=generator), strict=True))
    expected = _dense_scores(model, rows)
    all_of_it = {"examples": "all", "eigenvalue_examples": "all", "disjoint": False, "labels": "data"}
    exact = {"products": "float32", "check": False}
    with report_to(Silent()):
        task, model = Regression(), model.to(device)
        operator = fit(model, task, rows, modules="all", **all_of_it, **exact).inverse(damping=DAMPING)
        found = torch.as_tensor(score(model, task, rows[:QUERIES], rows, operator, rank="full", **exact).raw).double()
    error = (found - expected).norm() / expected.norm()
    return "EK-FAC scores against dense matrices", bool(error < 1e-3), f"relative error {error:.1e}"


def _dense_scores(model: nn.Sequential, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The first rows asked about all of them, `[QUERIES, ROWS]`, by the definition of EK-FAC on the host."""
    model, total = copy.deepcopy(model).double(), torch.zeros(QUERIES, len(rows), dtype=torch.float64)
    wide = [(x_I.double(), y_O.double()) for x_I, y_O in rows]
    for place in (0, 2):
        w_OI = model.get_parameter(f"{place}.weight")
        losses = [(model(x_I) - y_O).square().sum() / 2 for x_I, y_O in wide]  # one by one, where the engine has batches
        w_NOI = torch.stack([torch.autograd.grad(loss, w_OI)[0] for loss in losses])
        a_NI = torch.stack([model[:place](x_I).detach() for x_I, _ in wide])
        g_NO = torch.einsum("noi,ni->no", w_NOI, a_NI) / a_NI.square().sum(1, keepdim=True)  # a row's gradient is g a^T
        q_II, q_OO = (torch.linalg.eigh(x.T @ x)[1] for x in (a_NI, g_NO))
        turned_NOI = q_OO.T @ w_NOI @ q_II
        lambda_OI = turned_NOI.square().mean(0)
        asked_QOI = turned_NOI[:QUERIES] / (lambda_OI + DAMPING * lambda_OI.mean())
        total += torch.einsum("qoi,noi->qn", asked_QOI, turned_NOI)
    return total
