"""Methods that look back at the training, from its checkpoints."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.oracles.base import Case


def tracin(case: Case) -> np.ndarray:
    """`sum_t eta_t <grad m(q), grad log p(z)>` at the weights of each checkpoint (Pruthi et al. 2020, section 3.2)."""
    total = torch.zeros(len(case.queries), len(case.rows)).double()
    for checkpoint, at in case.at_checkpoints():
        total += checkpoint.learning_rate * at.m_QP @ at.g_NP.T
    return total.numpy()


ORACLES = {"tracin": tracin}
