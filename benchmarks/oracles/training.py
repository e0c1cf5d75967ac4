"""Methods that look back at the training, from its checkpoints."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.oracles.base import Case
from benchmarks.oracles.unrolled import by_module
from whence.fitting import fit
from whence.operators import BlockDiagonal
from whence.settings import Score


def tracin(case: Case) -> np.ndarray:
    """`sum_t eta_t <grad m(q), grad log p(z)>` at the weights of each checkpoint (Pruthi et al. 2020, section 3.2)."""
    total = torch.zeros(len(case.queries), len(case.rows)).double()
    for checkpoint, at in case.at_checkpoints():
        total += checkpoint.learning_rate * at.m_QP @ at.g_NP.T
    return total.numpy()


def checkpoint_mean(case: Case, damping: float = 0.1, start: float = 0.125) -> np.ndarray:
    """`mean_c 1/N <grad m(q), (G + damping)^-1 grad log p(z)>` at each checkpoint, `G` being the model's own factors."""
    assert case.training is not None
    m = by_module(case, case.m_QP)
    blocks = fit(case.model, case.task, case.rows, modules=list(m), precision=Score().precision).inverse(damping)
    total, first = torch.zeros(len(case.queries), len(case.rows)).double(), start * len(case.training.steps)
    points = [at for each, at in case.at_checkpoints() if each.step >= first]
    assert isinstance(blocks, BlockDiagonal)
    for at in points:
        asked, rows = by_module(at, at.m_QP), by_module(at, at.g_NP)
        total += sum(asked[name] @ blocks.blocks[name].dense().double() @ rows[name].T for name in m)
    return (total / len(points) / len(case.rows)).numpy()


ORACLES = {"tracin": tracin, "checkpoint-mean": checkpoint_mean}
