"""What looks alike to a model, one text after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case
from whence.engine.stream import encode


def representation_similarity(case: Case) -> np.ndarray:
    """Cosine of the mean last hidden states."""
    sides = [torch.stack([h_TI.mean(0) for h_TI in hidden(case, side)]) for side in (case.queries, case.rows)]
    x_QI, y_NI = (side / side.norm(dim=1, keepdim=True) for side in sides)
    return (x_QI @ y_NI.T).numpy()


def cka(case: Case) -> np.ndarray:
    """`HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` of linear kernels over the hidden units (Kornblith et al. 2019, eq. 3)."""
    return np.array([[_alignment(x, y) for y in hidden(case, case.rows)] for x in hidden(case, case.queries)])


def _alignment(x_SI: Tensor, y_TI: Tensor) -> float:
    units = x_SI.shape[1]
    centre = torch.eye(units).double() - 1 / units
    kernels = [h_TI.T @ h_TI for h_TI in (x_SI, y_TI)]

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        return torch.trace(k @ centre @ other @ centre)

    k, other = kernels
    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


def hidden(case: Case, side: Sequence[Any]) -> list[Tensor]:
    """Last hidden states `[T, I]` of a transformer at the positions that predict, text by text."""
    items = encode(case.task, side).items
    ids = [torch.from_numpy(item.ids[: case.task.size(item)])[None] for item in items]
    with torch.no_grad():
        return [case.model(input_ids=each, output_hidden_states=True).hidden_states[-1][0].double() for each in ids]


ORACLES = {"cka": cka, "embedding-knn": representation_similarity, "representation-similarity": representation_similarity}
