"""Random projections of one side of a weight matrix, and scales that tame an operator before projecting.

A matrix `W [O, I]` is kept as `P_O^T W P_I`, projected from both sides before it is ever formed: `W = sum_r g_r a_r^T`
becomes `sum_r (P_O^T g_r)(P_I^T a_r)^T` (LoGra: Choe et al. 2024; TrackStar: Chang et al. 2024). With independent
`P_O`, `P_I` and `E[P P^T] = 1`, `E<P_O^T W P_I, P_O^T V P_I> = <W, V>`: inner products keep their mean.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def projection(width: int, dim: int, key: str) -> Tensor:
    """Random signs over the root of `dim`, `[width, dim]` (Achlioptas 2003): `E[P P^T]` is the identity.

    The identity itself where it is no wider than `dim`. A function of its arguments alone, the same bits everywhere.
    """
    if width <= dim:
        return torch.eye(width)
    seed = int.from_bytes(hashlib.blake2b(f"{width}:{dim}:{key}".encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=seed).random_raw(-(-width * dim // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=width * dim).reshape(width, dim)
    return (torch.from_numpy(bits).float() * 2 - 1) / dim**0.5


def kronecker_scales(positive_OI: Tensor) -> tuple[Tensor, Tensor]:
    """`s_O`, `s_I` whose outer product is the least-squares fit to the logarithms: exact for a Kronecker product."""
    logs_OI = positive_OI.log()
    mean = logs_OI.mean()
    return (logs_OI.mean(1) - mean / 2).exp(), (logs_OI.mean(0) - mean / 2).exp()
