"""Random projections of one side of a weight matrix or of all its numbers, and scales that tame an operator before projecting.

A matrix `W [O, I]` is kept as `P_O^T W P_I`, projected from both sides before it is ever formed: `W = sum_r g_r a_r^T`
becomes `sum_r (P_O^T g_r)(P_I^T a_r)^T` (LoGra: Choe et al. 2024; TrackStar: Chang et al. 2024). With independent
`P_O`, `P_I` and `E[P P^T] = 1`, `E<P_O^T W P_I, P_O^T V P_I> = <W, V>`: inner products keep their mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def projection(width: int, dim: int, key: str) -> Tensor:
    """Random signs over the root of `dim`, `[width, dim]` (Achlioptas 2003): `E[P P^T]` is the identity.

    The identity itself where it is no wider than `dim`. A function of its arguments alone, the same bits everywhere.
    """
    if width <= dim:
        return torch.eye(width)
    words = _random_words(-(-width * dim // 64), f"{width}:{dim}:{key}")
    bits = np.unpackbits(words.view(np.uint8), count=width * dim).reshape(width, dim)
    return (torch.from_numpy(bits).float() * 2 - 1) / dim**0.5


@dataclass(frozen=True)
class Sparse:
    """A sparse Johnson-Lindenstrauss matrix `[dim, width]`, held as the `S` shuffles of its numbers that it adds up.

    Each shuffle deals the numbers out, with random signs, to sums of its own, `dim / S` of them: a column has `S` entries,
    `S^-1/2` in size. Places are int32 as far as that reaches, signs int8: five bytes for each entry.
    """

    order_SK: Tensor
    signs_SK: Tensor
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        """Project vectors `[..., width]` to `[..., dim]`."""
        sums = self.dim // len(self.order_SK)
        parts = []
        for order_K, signs_K in zip(self.order_SK, self.signs_SK, strict=True):
            entries_K = (signs_K.to(torch.float32) / len(self.order_SK) ** 0.5).to(x.dtype)
            shuffled = x.index_select(-1, order_K).mul_(entries_K)
            if missing := -len(order_K) % sums:
                shuffled = F.pad(shuffled, (0, missing))
            parts.append(shuffled.unflatten(-1, (-1, sums)).sum(-2))
        return torch.cat(parts, -1)

    def to(self, like: Tensor) -> Sparse:
        """The same for vectors on the device of `like`."""
        return Sparse(self.order_SK.to(like.device), self.signs_SK.to(like.device), self.dim)


def sparse_projection(width: int, dim: int, key: str, nonzeros: int = 1) -> Sparse:
    """A sparse Johnson-Lindenstrauss transform (Kane & Nelson 2014), `nonzeros` entries a column: `E[S^T S]` is the identity.

    Sums get equally many numbers, up to one, which takes nothing from that. `nonzeros` divides `dim`. The identity where the
    vectors are no wider than `dim`. A function of its arguments alone, the same bits everywhere.
    """
    if width <= dim:
        return Sparse(torch.arange(width, dtype=place_dtype(width))[None], torch.ones(1, width, dtype=torch.int8), width)
    words = _random_words(nonzeros * width, f"sparse:{width}:{dim}:{nonzeros}:{key}")
    return _shuffles(words.reshape(nonzeros, width), dim)


def dealt(width: int, dim: int, key: str) -> Sparse:
    """A sparse transform to `dim` numbers of vectors, also narrower ones, to which zeros are added, up to a multiple of `dim`.

    Sums of it for several vectors, each with its own key, are that of all of them side by side. A function of its arguments.
    """
    return _shuffles(_random_words(-(-width // dim) * dim, f"dealt:{width}:{dim}:{key}")[None], dim)


def _shuffles(words_SK: np.ndarray, dim: int) -> Sparse:
    """The order that sorts each row of random words; the words' last bits are signs."""
    order_SK = torch.from_numpy(words_SK.argsort(axis=1, kind="stable")).to(place_dtype(words_SK.shape[1]))
    return Sparse(order_SK, torch.from_numpy((words_SK & 1).astype(np.int8)) * 2 - 1, dim)


def place_dtype(width: int) -> torch.dtype:
    """Of the places in a vector."""
    return torch.int32 if width <= 2**31 else torch.int64


def mask(width: int, dim: int, key: str) -> Tensor:
    """Places of `dim` numbers of a vector, drawn without putting back, in order; all of them where it is no wider."""
    words = _random_words(width, f"mask:{width}:{dim}:{key}")
    return torch.from_numpy(np.sort(words.argsort(kind="stable")[:dim]))


def _random_words(count: int, key: str) -> np.ndarray:
    """So many random words of 64 bits, the same everywhere."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.random.Philox(key=seed).random_raw(count).astype("<u8")


def kronecker_scales(positive_OI: Tensor) -> tuple[Tensor, Tensor]:
    """`s_O`, `s_I` whose outer product is the least-squares fit to the logarithms: exact for a Kronecker product."""
    logs_OI = positive_OI.log()
    mean = logs_OI.mean()
    return (logs_OI.mean(1) - mean / 2).exp(), (logs_OI.mean(0) - mean / 2).exp()
