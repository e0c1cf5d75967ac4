"""Eigendecomposition that either is right or says which matrix is not."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whence.errors import NumericalError
from whence.precision import are_short


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]` (ascending, negative rounding errors set to 0) and eigenvectors `[n, n]` (columns), in float64.

    The matrix is given by its lower triangle; it is a sum of squares, so positive semi-definite up to rounding. One summed
    up from shorter products is decomposed in its own format, which takes half the time: the eigenvectors are as orthonormal
    as that format can say, and what they lose is less than what the products did. In float64, where torch has MKL and the
    processor is AMD's, numpy's LAPACK is asked, which is faster there. A failure on an accelerator is retried on the CPU,
    one of LAPACK's divide and conquer with its slower and more robust QR iteration in float64.

    Raises NumericalError naming `name` where the matrix has a NaN or an infinity, or where no solver converges.
    """
    finite = torch.isfinite(matrix)
    if not bool(finite.all()):
        raise NumericalError(
            f"The covariance of {name} is not finite",
            given=f"{int((~finite).sum())} of {matrix.numel()} entries are NaN or infinite",
            fix="look for rows with a huge or undefined loss, or fit in float32 (--dtype float32)",
        )
    values, vectors = _solve(matrix if are_short() else matrix.to(torch.float64), name)
    return values.clamp(min=0), vectors


@functools.cache
def _numpy_is_faster() -> bool:
    """Whether numpy's LAPACK (its wheels have OpenBLAS) beats torch's: MKL on an AMD. The same for all runs on a machine."""
    if not torch.backends.mkl.is_available():
        return False
    known = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (known.read_text(encoding="utf-8") if known.exists() else platform.processor())


def _by_numpy(lower: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors of a matrix on the CPU; None where they do not converge."""
    try:
        values, vectors = np.linalg.eigh(lower.numpy(), UPLO="L")
    except np.linalg.LinAlgError:
        return None
    return (torch.from_numpy(values), torch.from_numpy(vectors)) if np.isfinite(vectors).all() else None


def _solve(lower: Tensor, name: str) -> tuple[Tensor, Tensor]:
    plain = type(lower) is Tensor and lower.device.type == "cpu"  # not one without numbers, with which a plan is made
    if plain and lower.dtype == torch.float64 and _numpy_is_faster() and (found := _by_numpy(lower)):
        return found
    for device in dict.fromkeys([lower.device, torch.device("cpu")]):
        try:
            values, vectors = torch.linalg.eigh(lower.to(device), UPLO="L")
        except RuntimeError:  # torch's LinAlgError is one
            continue
        if bool(torch.isfinite(vectors).all()):
            return values.to(lower.device), vectors.to(lower.device)
    import scipy.linalg  # half a second, and hardly ever needed

    try:
        solved = scipy.linalg.eigh(lower.double().cpu().numpy(), driver="ev")
    except scipy.linalg.LinAlgError as error:
        raise NumericalError(f"The eigendecomposition of the covariance of {name} did not converge") from error
    values, vectors = (torch.from_numpy(part).to(lower.device) for part in solved)
    return values, vectors
