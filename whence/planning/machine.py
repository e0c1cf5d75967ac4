"""How fast this machine multiplies, moves and decomposes: measured in a few seconds, once per process."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from whence.linalg.eigh import eigh

SIZES = (256, 1024)
ROWS = 1024
BUDGET = 0.25
"""Seconds for each measurement, at least two repeats."""


@dataclass(frozen=True)
class Machine:
    """Rates of one device: FLOPs per second by width of a product, bytes per second, eigendecompositions' FLOPs per second."""

    multiply: tuple[tuple[int, float], ...]
    move: float
    decompose: tuple[tuple[int, float], ...]
    measured: bool

    def rate(self, width: float) -> float:
        """FLOPs per second of products of such a width."""
        return _between(self.multiply, width)

    def eigen_rate(self, width: float) -> float:
        """Nominal FLOPs per second (9 n^3) of an eigendecomposition."""
        return _between(self.decompose, width)


DEFAULTS = {
    "cpu": Machine(((256, 4e10), (1024, 5e10)), 1e10, ((256, 1.5e10), (512, 2.5e10)), measured=False),
    "cuda": Machine(((256, 5e12), (4096, 4e13)), 1e12, ((256, 1e10), (4096, 3e11)), measured=False),
}
"""What to expect of a core of a server and of a data-centre GPU in float32; for ranges only."""


def assumed(device: str) -> Machine:
    """Rates that nobody measured."""
    return DEFAULTS["cuda" if device.startswith("cuda") else "cpu"]


@functools.cache
def measured(device: str, dtype: torch.dtype, products: str) -> Machine:
    """Rates of this machine now, with the threads and in the format of `products` that torch uses now."""
    multiplied, decomposed = [], []
    for size in SIZES:
        a, b = torch.randn(ROWS, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        multiplied.append((size, 2 * ROWS * size**2 / _seconds(lambda a=a, b=b: a @ b, device)))
    for size in (256, 640):
        x = torch.randn(size, 2 * size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        matrix = x @ x.T
        decomposed.append((size, 9 * size**3 / _seconds(lambda matrix=matrix: eigh(matrix, "nothing"), device)))
    block = torch.randn(2**24 if device == "cpu" else 2**27, device=device)
    target = torch.empty_like(block)
    move = 2 * block.nbytes / _seconds(lambda: target.copy_(block), device)
    return Machine(tuple(multiplied), move, tuple(decomposed), measured=True)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The least time of several runs: what it takes when nobody else is at it."""
    work()
    times: list[float] = []
    while len(times) < 2 or sum(times) < BUDGET:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _between(points: tuple[tuple[int, float], ...], width: float) -> float:
    """Interpolated in the logarithm of the width; beyond the ends, the rate there."""
    (low, first), *_, (high, last) = points
    place = math.log(max(low, min(high, width)) / low) / math.log(high / low)
    return first ** (1 - place) * last**place
