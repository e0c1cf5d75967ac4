"""Methods that unroll the training: the whole run as one graph, and its segments with dense matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.attention import plain_attention
from whence.train.replay import History
from whence.validate.problem import Problem


def magic(case: Case, **settings: object) -> np.ndarray:
    """`d m(theta_T) / d w`, reverse-mode through the graph of all steps at once (Ilyas & Engstrom 2025, section 3)."""
    problem = Problem(case.model, case.task, case.rows, case.queries)
    w_N = torch.ones(len(case.rows)).double().requires_grad_()
    theta_P = rerun(case, problem, w_N)
    m_QP = problem.moved_to(theta_P).query_gradients()
    return torch.stack([torch.autograd.grad(theta_P, w_N, m_P, retain_graph=True)[0] for m_P in m_QP]).numpy()


def rerun(case: Case, problem: Problem, w_N: Tensor) -> Tensor:
    """The weights that the recorded training would end with if the loss of row n counted `w_N[n]` times."""
    history: History | None = case.training
    assert history is not None
    how, places = history.replay(), {name: row for row, name in enumerate(problem.train.ids)}
    theta_P = problem.vector(dict(how.start)).requires_grad_()
    decays = {name: 0.0 if name in how.descent.undecayed else how.descent.weight_decay for name in problem.shapes}
    decay_P = problem.vector({name: torch.full(shape, decays[name]) for name, shape in problem.shapes.items()})
    rule, first_P, second_P = how.descent.optimizer, torch.zeros_like(theta_P), torch.zeros_like(theta_P)
    for number, (names, rate) in enumerate(zip(how.steps, how.learning_rates.tolist(), strict=True), 1):
        rows = [places[name] for name in names]
        tokens = sum(case.task.predictions(problem.train.items[row]) for row in rows)
        with plain_attention():
            losses = [w_N[row] * problem.at(theta_P, case.task.losses, problem.row(row)).sum() for row in rows]
        loss = torch.stack(losses).sum() / (tokens if how.per == "token" else len(rows))
        (g_P,) = torch.autograd.grad(loss, theta_P, create_graph=True)
        if rule.clip and g_P.norm() > rule.clip:
            g_P = g_P * rule.clip / (g_P.norm() + 1e-6)
        if rule.kind == "sgd":
            first_P = rule.momentum * first_P + g_P + decay_P * theta_P
            theta_P = theta_P - rate * first_P
        else:
            (beta1, beta2), theta_P = rule.betas, theta_P * (1 - rate * decay_P)
            first_P = beta1 * first_P + (1 - beta1) * g_P
            second_P = beta2 * second_P + (1 - beta2) * g_P**2
            spread_P = (second_P / (1 - beta2**number) + 1e-30).sqrt() + rule.eps
            theta_P = theta_P - rate * first_P / (1 - beta1**number) / spread_P
    return theta_P


ORACLES = {"magic": magic}
