"""Eigendecomposition that either is right or says which matrix is not."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from whence.errors import NumericalError


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]` (ascending, negative rounding errors set to 0) and eigenvectors `[n, n]` (columns) in float64.

    The matrix is a sum of squares, so it is symmetric and positive semi-definite up to rounding. A failure on an accelerator is
    retried on the CPU, one of LAPACK's divide and conquer with its slower and more robust QR iteration.

    Raises NumericalError naming `name` where the matrix has a NaN or an infinity, or where no solver converges.
    """
    finite = torch.isfinite(matrix)
    if not bool(finite.all()):
        raise NumericalError(
            f"The covariance of {name} is not finite",
            given=f"{int((~finite).sum())} of {matrix.numel()} entries are NaN or infinite",
            fix="look for rows with a huge or undefined loss, or fit in float32 (--dtype float32)",
        )
    symmetric = matrix.to(torch.float64)
    symmetric = (symmetric + symmetric.T) / 2
    values, vectors = _solve(symmetric, name)
    return values.clamp(min=0), vectors


def _solve(symmetric: Tensor, name: str) -> tuple[Tensor, Tensor]:
    for device in dict.fromkeys([symmetric.device, torch.device("cpu")]):
        try:
            values, vectors = torch.linalg.eigh(symmetric.to(device))
        except RuntimeError:  # torch's LinAlgError is one
            continue
        if bool(torch.isfinite(vectors).all()):
            return values.to(symmetric.device), vectors.to(symmetric.device)
    try:
        solved = scipy.linalg.eigh(symmetric.cpu().numpy(), driver="ev")
    except scipy.linalg.LinAlgError as error:
        raise NumericalError(f"The eigendecomposition of the covariance of {name} did not converge") from error
    values, vectors = (torch.from_numpy(part).to(symmetric.device) for part in solved)
    return values, vectors
