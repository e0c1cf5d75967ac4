"""Methods that unroll the training: the whole run as one graph, and its segments with dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.attention import plain_attention
from whence.coverage import cover
from whence.engine.products import Weights
from whence.fitting import fit
from whence.fitting.covariance import Sides
from whence.operators import EigenBlock
from whence.settings import Score
from whence.train.replay import History, Snapshot
from whence.validate.problem import Problem


def magic(case: Case, **settings: object) -> np.ndarray:
    """`d m(theta_T) / d w`, reverse-mode through the graph of all steps at once (Ilyas & Engstrom 2025, section 3)."""
    problem = Problem(case.model, case.task, case.rows, case.queries)
    w_N = torch.ones(len(case.rows)).double().requires_grad_()
    theta_P = rerun(case, problem, w_N)
    m_QP = problem.moved_to(theta_P).query_gradients()
    return torch.stack([torch.autograd.grad(theta_P, w_N, m_P, retain_graph=True)[0] for m_P in m_QP]).numpy()


def rerun(case: Case, problem: Problem, w_N: Tensor, lesson: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
    """The weights that the recorded training would end with if the loss of row n counted `w_N[n]` times.

    A `lesson` is added to the summed loss of each step, counted from 1.
    """
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
            losses += [lesson(number, theta_P)] if lesson else []
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


def mirror(
    case: Case,
    share: float = 1.0,
    complement: bool = False,
    start: float = 0.125,
    eps: float = 0.1,
    ekfac: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """`(loss_z(base) - loss_z(with q)) / (eps * steps with q / epochs)`, one training after the other."""
    assert case.training is not None and not ekfac
    problem, steps = Problem(case.model, case.task, case.rows, case.queries), case.training.steps
    order = torch.randperm(len(case.rows), generator=torch.Generator().manual_seed(seed))
    read_N, first = (order < round(share * len(order))).double(), int(start * len(steps))
    epochs = sum(map(len, steps)) / len({row for step in steps for row in step})

    def losses(theta_P: Tensor) -> Tensor:
        return torch.cat([problem.at(theta_P, case.task.losses, problem.row(row)) for row in range(len(case.rows))]).detach()

    def gains(w_N: Tensor, query: Any) -> Tensor:
        def lesson(number: int, theta_P: Tensor) -> Tensor:
            return -eps * (number > first) * problem._measure(theta_P, query)

        return losses(rerun(case, problem, w_N)) - losses(rerun(case, problem, w_N, lesson))

    halves = [read_N, 1 - read_N] if complement else [read_N]
    found = [[gains(w_N, query) for query in problem.asked] for w_N in halves]
    return torch.stack([torch.stack(each) for each in found]).mean(0).numpy() * epochs / (eps * (len(steps) - first))


def source(case: Case, segments: int = 3, curvature: str = "ekfac") -> np.ndarray:
    """`1/N m^T sum_l (prod_{l' > l} e^(-T H)) (I - e^(-T H)) H^-1 mean g`, module by module (Bae et al. 2024, section 3).

    The time `T` is the sum of a segment's rates; for Adam `H` stands for `H / d`, d being `sqrt(v)` in the basis of `H`.
    """
    history = case.training
    assert history is not None
    descent, rates, m = history.descent(), history.learning_rates, by_module(case, case.m_QP)
    total, one = torch.zeros(len(case.queries), len(case.rows)).double(), {}
    pieces = np.array_split(np.arange(len(history.checkpoints)), min(segments, len(history.checkpoints)))
    for number, piece in reversed(list(enumerate(pieces))):
        points = [at for place, at in enumerate(case.at_checkpoints()) if place in piece]
        start = history.checkpoints[piece[0] - 1].step if number else 0
        end = points[-1][0].step if number < len(pieces) - 1 else len(rates)
        time = rates[start:end].sum() / (1 - descent.optimizer.momentum)
        chosen = {"method": curvature, "modules": list(m), "precision": Score().precision}
        fits = [fit(at.model, case.task, case.rows, **chosen) for _, at in points]
        gradients = [by_module(at, at.g_NP) for _, at in points]
        spreads = [by_module(case, spread(case, checkpoint)[None]) for checkpoint, _ in points]
        for name in m:
            q_PP = eigenbasis([each.blocks[name] for each in fits], [each.sides.get(name) for each in fits])
            h_PP = torch.stack([each.blocks[name].dense() for each in fits]).mean(0)
            d_PP = torch.stack([each[name][0] for each in spreads]).mean(0).diag()
            h_P, d_P = (q_PP.T @ h_PP @ q_PP).diag(), (q_PP.T @ d_PP @ q_PP).diag() * history.loss_scale
            lasts_PP = torch.linalg.matrix_exp(-time * (h_P / d_P + descent.weight_decay).diag())
            answer_PP = (torch.eye(len(h_P)) - lasts_PP) @ (h_P + d_P * descent.weight_decay).diag().inverse()
            after_QP = one.get(name, m[name]) @ q_PP
            total += after_QP @ answer_PP @ q_PP.T @ torch.stack([each[name] for each in gradients]).mean(0).T
            one[name] = after_QP @ lasts_PP @ q_PP.T
    return (total / len(case.rows)).numpy()


def spread(case: Case, checkpoint: Snapshot) -> Tensor:
    """`sqrt(v) + eps` of every weight, by which Adam divides; ones for SGD."""
    assert case.training is not None
    rule, moments = case.training.descent().optimizer, checkpoint.second_moments()
    if rule.kind == "sgd":
        return torch.ones_like(case.problem.theta)
    return (case.problem.vector(moments) / (1 - rule.betas[1] ** checkpoint.step)).sqrt() + rule.eps


def by_module(case: Case, vectors_KP: Tensor) -> dict[str, Tensor]:
    """Vectors of all tracked weights as one of each module, `[K, O*I]`."""
    weights = Weights(case.problem.model, cover(case.problem.model, case.modules or case.task.default_modules).sites)
    named = {key: vectors_KP[:, span].unflatten(1, case.problem.shapes[key]) for key, span in case.spans().items()}
    return {name: matrix.flatten(1) for name, matrix in weights.gather(named).items()}


def eigenbasis(blocks: list[EigenBlock], sides: list[Sides | None]) -> Tensor:
    """Eigenvectors of the mean covariances' Kronecker product; the weights' own basis where there are no covariances."""
    if not sides[0]:
        return torch.eye(blocks[0].lam_OI.numel()).double()
    out_OO, in_II = torch.zeros(()), torch.zeros(())
    for block, side in zip(blocks, sides, strict=True):
        assert block.q_O and block.q_I and side
        q_O, q_I = block.q_O.dense(), block.q_I.dense()
        out_OO, in_II = out_OO + q_O @ side.out_O.diag() @ q_O.T, in_II + q_I @ side.in_I.diag() @ q_I.T
    return torch.kron(torch.linalg.eigh(out_OO)[1], torch.linalg.eigh(in_II)[1])


ORACLES = {"magic": magic, "mirror": mirror, "source": source}
