"""Checks that this machine computes correctly, in seconds."""

from __future__ import annotations

import torch


def self_test(device: str | torch.device = "cpu") -> list[tuple[str, bool, str]]:
    """Run every check on a device: its name, whether it passed, and what was measured."""
    return [check(torch.device(device)) for check in (_eigh, _low_precision_product)]


def _eigh(device: torch.device) -> tuple[str, bool, str]:
    """Rebuild a float64 covariance from its eigenvectors and eigenvalues."""
    x = torch.randn(96, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    covariance = x.T @ x
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    error = ((vectors * eigenvalues) @ vectors.T - covariance).norm() / covariance.norm()
    return "float64 eigendecomposition", bool(error < 1e-12), f"relative error {error:.1e}"


def _low_precision_product(device: torch.device) -> tuple[str, bool, str]:
    """Multiply bfloat16 matrices whose sums bfloat16 could not hold: a float32 accumulator gets them right."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    exact = a.float() @ b.float()
    error = ((a @ b).float() - exact).norm() / exact.norm()
    return "bfloat16 product against float32", bool(error < 2**-8), f"relative error {error:.1e}"
