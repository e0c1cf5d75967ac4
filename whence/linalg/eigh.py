"""Eigendecomposition that either is right or says which matrix is not."""

from __future__ import annotations

import torch
from torch import Tensor

from whence.errors import NumericalError


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]` (ascending, negative rounding errors set to 0) and eigenvectors `[n, n]` (columns) in float64.

    The matrix is given by its lower triangle; it is a sum of squares, so positive semi-definite up to rounding. A failure
    on an accelerator is retried on the CPU, one of LAPACK's divide and conquer with its slower and more robust QR iteration.

    Raises NumericalError naming `name` where the matrix has a NaN or an infinity, or where no solver converges.
    """
    finite = torch.isfinite(matrix)
    if not bool(finite.all()):
        raise NumericalError(
            f"The covariance of {name} is not finite",
            given=f"{int((~finite).sum())} of {matrix.numel()} entries are NaN or infinite",
            fix="look for rows with a huge or undefined loss, or fit in float32 (--dtype float32)",
        )
    values, vectors = _solve(matrix.to(torch.float64), name)
    return values.clamp(min=0), vectors


def _solve(lower: Tensor, name: str) -> tuple[Tensor, Tensor]:
    for device in dict.fromkeys([lower.device, torch.device("cpu")]):
        try:
            values, vectors = torch.linalg.eigh(lower.to(device), UPLO="L")
        except RuntimeError:  # torch's LinAlgError is one
            continue
        if bool(torch.isfinite(vectors).all()):
            return values.to(lower.device), vectors.to(lower.device)
    import scipy.linalg  # half a second, and hardly ever needed

    try:
        solved = scipy.linalg.eigh(lower.cpu().numpy(), driver="ev")
    except scipy.linalg.LinAlgError as error:
        raise NumericalError(f"The eigendecomposition of the covariance of {name} did not converge") from error
    values, vectors = (torch.from_numpy(part).to(lower.device) for part in solved)
    return values, vectors
