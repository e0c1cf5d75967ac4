"""How alike two texts' representations are: cosines of vectors, and centred kernel alignment of matrices.

Letters: Q queries, B rows, T and S positions, I hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cosines(x_QI: Tensor, y_BI: Tensor) -> Tensor:
    """Cosine of every pair of vectors, `[Q, B]`; 0 where one of them is 0."""
    return _unit(x_QI) @ _unit(y_BI).T


def distances(x_QI: Tensor, y_BI: Tensor) -> Tensor:
    """Euclidean distance of every pair of vectors, `[Q, B]`."""
    return torch.cdist(x_QI, y_BI, compute_mode="donot_use_mm_for_euclid_dist")


def masked_mean(y_BTI: Tensor, real_BT: Tensor) -> Tensor:
    """Mean over the real positions, `[B, I]`."""
    real_BT1 = real_BT.unsqueeze(-1).to(y_BTI)
    return (y_BTI * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)


def linear_cka(x: Sequence[Tensor], y_BTI: Tensor, real_BT: Tensor) -> Tensor:
    """Linear CKA of matrices `x [S, I]`, one per query, with those of a batch, `[Q, B]` (Kornblith et al. 2019, eq. 5).

    Texts have tokens of their own, and hidden units in common: these are the "examples" that both describe, and over them
    each token's vector is centred. `|X Y^T|^2 / (|X X^T| |Y Y^T|)` in Frobenius norms, 0 where a text has no spread.
    """
    y = _centred(y_BTI) * real_BT.unsqueeze(-1).to(y_BTI)
    size_B = (y @ y.mT).flatten(1).norm(dim=1)
    rows = []
    for x_SI in map(_centred, x):
        cross_B = torch.einsum("si,bti->bst", x_SI, y).square().sum((1, 2))
        sizes_B = (x_SI @ x_SI.T).norm() * size_B
        rows.append(torch.where(sizes_B == 0, 0.0, cross_B / sizes_B))
    return torch.stack(rows)


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / norm)  # NaN stays what it is


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
