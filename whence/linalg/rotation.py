"""An orthogonal change of basis of one side of a weight matrix, whole or block-diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.linalg.aligned import product


def split_sizes(width: int, largest: int | None) -> list[int]:
    """Widths of the diagonal blocks of a side: as equal as possible, none above `largest` (None: one block).

    A huge factor is approximated by its diagonal blocks (Grosse et al. 2023, appendix A), which divides memory by the
    number of blocks and time of the eigendecomposition by its square.
    """
    count = 1 if largest is None else -(-width // largest)
    return [width // count + (i < width % count) for i in range(count)]


@dataclass(frozen=True)
class Rotation:
    """Block-diagonal orthogonal matrix `Q [n, n]`, kept as its blocks."""

    blocks: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        """N."""
        return sum(len(block) for block in self.blocks)

    def rotate(self, x: Tensor) -> Tensor:
        """`x Q` for `x [..., k, n]`: coordinates in the new basis."""
        return self._by_block(x, -1, product)

    def unrotate(self, x: Tensor) -> Tensor:
        """`x Q^T` for `x [..., k, n]`: back to the old basis."""
        return self._by_block(x, -1, lambda part, block: product(part, block.T))

    def rotate_rows(self, x: Tensor) -> Tensor:
        """`Q^T x` for `x [..., n, k]`: the rows' coordinates in the new basis."""
        return self._by_block(x, -2, lambda part, block: product(block.T, part))

    def unrotate_rows(self, x: Tensor) -> Tensor:
        """`Q x` for `x [..., n, k]`: back to the old basis."""
        return self._by_block(x, -2, lambda part, block: product(block, part))

    def dense(self) -> Tensor:
        """`Q [n, n]`."""
        return torch.block_diag(*self.blocks)

    def to(self, like: Tensor) -> Rotation:
        """The same in the dtype and on the device of `like`."""
        return Rotation(tuple(block.to(like) for block in self.blocks))

    def _by_block(self, x: Tensor, dim: int, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if len(self.blocks) == 1:
            return multiply(x, self.blocks[0])
        parts: Sequence[Tensor] = x.split([len(block) for block in self.blocks], dim=dim)
        return torch.cat([multiply(part, block) for part, block in zip(parts, self.blocks, strict=True)], dim=dim)
