"""How a fitted curvature is: what its eigenvalues say about rank, conditioning and numerical trouble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.fitting.curvature import Curvature


@dataclass(frozen=True)
class Health:
    """One module's eigenvalues, in numbers; `d` is the damping times their mean."""

    module: str
    shape: tuple[int, int]
    mean: float
    largest: float
    condition: float
    """`(largest + d) / (smallest + d)`: by how much the damped inverse stretches one direction more than another."""
    effective_rank: float
    """`sum lambda / (lambda + d)`: how many of the `O * I` directions the damping leaves to the data."""
    zero: float
    """Share of eigenvalues that are zero to working precision."""
    negative: int
    not_finite: int

    @property
    def sound(self) -> bool:
        """Whether the numbers can be used: finite, not negative, and not all zero."""
        return not self.negative and not self.not_finite and self.mean > 0


def health(curvature: Curvature, damping: float = 0.1) -> list[Health]:
    """Examine every module, with the damping relative to its mean eigenvalue."""
    return [_examine(name, block.lam_OI, damping) for name, block in curvature.blocks.items()]


def _examine(name: str, lam_OI: Tensor, damping: float) -> Health:
    shape, finite = (lam_OI.shape[0], lam_OI.shape[1]), torch.isfinite(lam_OI)
    lam = lam_OI[finite].double()
    d = damping * lam.mean()
    return Health(
        module=name,
        shape=shape,
        mean=lam.mean().item(),
        largest=lam.max().item(),
        condition=((lam.max() + d) / (lam.min() + d)).item(),
        effective_rank=(lam / (lam + d)).nan_to_num().sum().item(),
        zero=(lam <= torch.finfo(lam_OI.dtype).eps * lam.max()).double().mean().item(),
        negative=int((lam < 0).sum()),
        not_finite=int((~finite).sum()),
    )


def concentration(lam_OI: Tensor, shares: Sequence[float] = (0.9, 0.95, 0.99)) -> dict[float, int]:
    """How many of the largest eigenvalues hold each share of their sum."""
    cumulative = lam_OI.double().flatten().sort(descending=True).values.cumsum(0)
    return {share: int((cumulative < share * cumulative[-1]).sum()) + 1 for share in shares}
