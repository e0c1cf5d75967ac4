"""Corrected eigenvalues: second moments of the examples' gradients along given directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from whence.engine.sinks import Sums
from whence.gradients import Gradient, cached_chunks
from whence.operators.eigen import EigenBlock, SharedInputs, blocks_to


class Eigenvalues(Sums):
    """Sums over examples of the squared gradient in the basis of each block, `[O, I]` (George et al. 2018, equation 8).

    The blocks' own eigenvalues are not used.
    """

    def __init__(self, bases: Mapping[str, EigenBlock], *, operands: torch.dtype, sums: torch.dtype, device: torch.device):
        super().__init__(sums, device)
        self.operands = operands
        self.bases = blocks_to(bases, torch.empty(0, dtype=operands, device=device))
        self.shared = SharedInputs()

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add one site's share of the batch."""
        if name not in self.bases:  # no gradient reached it in the pass for the covariances
            return
        total = self.sum_of(name, *gradient.shape[1:])
        block, gradient = self.shared.rotate(self.bases[name], gradient, readers)
        left, gradient = block.ahead(gradient.to(self.operands))
        for part in cached_chunks(gradient):
            for w_OI in left.rotate(part).w_BOI:
                w_OI = w_OI.to(total.dtype)
                total.addcmul_(w_OI, w_OI)
