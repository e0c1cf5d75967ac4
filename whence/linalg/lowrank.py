"""Low-rank approximation of a batch of matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def randomized_svd(
    w_QOI: Tensor, rank: int, *, seed: int = 0, oversampling: int = 10, iterations: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors `g_QRO`, `a_QRI` with `sum_r g_r a_r^T` close to the best rank-`rank` approximation, and the energy kept `[Q]`.

    Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1: a seeded Gaussian sketch with oversampling and subspace
    iterations. Energy is the share of the squared Frobenius norm, 1 for a zero matrix. Each singular value is shared
    evenly by its two factors.
    """
    n_out, n_in = w_QOI.shape[-2:]
    width = min(rank + oversampling, n_out, n_in)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n_in, width, generator=generator, dtype=torch.float64).to(w_QOI)
    basis = torch.linalg.qr(w_QOI @ sketch).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(w_QOI @ torch.linalg.qr(w_QOI.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ w_QOI, full_matrices=False)
    rank = min(rank, width)
    root = s[:, :rank].sqrt().unsqueeze(-1)
    total = w_QOI.square().sum((-2, -1))
    energy = torch.where(total > 0, s[:, :rank].square().sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)
    return (basis @ u[..., :rank]).mT * root, vh[:, :rank] * root, energy
