"""Float32 matrices in a CPU's memory whose rows begin on cache lines: products are written into them faster.

A layer with a bias has widths such as 257 and 1025. Rows of a result that lie so far apart cost MKL up to a third of its
speed (torch 2.13, AMD Zen 4: 48 to 70 GFLOP/s where 80 to 98 are possible); how the operands' rows lie hardly matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whence.precision import are_short

LINE = 16
"""Float32 numbers in a cache line."""

NARROW = 128
"""Width up to which nothing is gained."""


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, with rows on cache lines where that makes products into them faster."""
    if not _gains(shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)
    return _empty(shape, dtype, device).zero_()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that lies as `zeros` would: sums that go on from a copy are the same to the last bit."""
    if not _gains(tensor.shape, tensor.dtype, tensor.device):
        return tensor
    return _empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of tensors without a gradient, of which one is a matrix and the other a matrix or a stack of them."""
    stack = left.shape[:-2] if right.ndim == 2 else right.shape[:-2]
    shape = (*stack, left.shape[-2], right.shape[-1])
    if are_short() or left.dtype != right.dtype or not _gains(shape, left.dtype, left.device):
        return left @ right
    return torch.matmul(left, right, out=_empty(shape, left.dtype, left.device))


def _gains(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    odd = len(shape) > 1 and shape[-1] > NARROW and shape[-1] % LINE != 0
    return odd and dtype == torch.float32 and device.type == "cpu"


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    room = -(-shape[-1] // LINE) * LINE
    return torch.empty((*shape[:-1], room), dtype=dtype, device=device)[..., : shape[-1]]
