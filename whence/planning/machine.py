"""How fast this machine multiplies, moves and decomposes, measured in a few seconds; and what a kernel asks of it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from whence.linalg.eigh import eigh
from whence.precision import rounded

aten = torch.ops.aten

PRODUCTS = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}
"""FLOPs of the kernels that multiply matrices: torch's formulas, also for those that torch leaves out."""

DECOMPOSITIONS: dict[Any, Callable[[int, int], float]] = {
    aten._linalg_eigh: lambda long, short: 9 * short**3,
    aten.linalg_qr: lambda long, short: 4 * long * short**2,
    aten._linalg_svd: lambda long, short: 6 * long * short**2 + 20 * short**3,
}
"""Nominal FLOPs of those that decompose one of these sides (Golub & Van Loan 2013, sections 8.3, 5.2 and 8.6)."""

ROW_PICKERS = (aten.embedding, aten.gather, aten.index, aten.index_select)
"""Kernels that read as much as they write, however large what they pick from."""


class Kernel(NamedTuple):
    """One kernel's work: FLOPs of products or of a decomposition of this width, and the bytes read and written."""

    flops: float
    moved: int
    width: float
    dtype: torch.dtype
    decomposes: bool = False


def kernel_of(func: Any, args: Any, kwargs: Any, result: Any) -> Kernel:
    """What an operator does with these arguments, whether they hold numbers or not.

    The width of a product `[m, k] @ [k, n]` is the narrowest of the three: its FLOPs, over two for each number of the
    largest matrix.
    """
    operator = func.overloadpacket
    tensors = [part for part in tree_leaves((args, kwargs, result)) if isinstance(part, Tensor)]
    moving = tree_leaves((result, result)) if operator in ROW_PICKERS else tensors
    moved = sum(min(part.nbytes, part.untyped_storage().nbytes()) for part in moving)  # an expanded tensor is read once
    if operator in DECOMPOSITIONS:
        *stack, rows, columns = args[0].shape
        long, short = max(rows, columns), min(rows, columns)
        return Kernel(math.prod(stack) * DECOMPOSITIONS[operator](long, short), moved, short, args[0].dtype, decomposes=True)
    flops = PRODUCTS[operator](*args, **kwargs, out_val=result) if operator in PRODUCTS else 0
    largest = max(part.numel() for part in tensors)
    return Kernel(flops, moved, flops / 2 / max(1, largest), tensors[0].dtype)


Rates = tuple[tuple[int, float], ...]
"""FLOPs per second by width."""


@dataclass(frozen=True)
class Machine:
    """Rates of one device: of products in each dtype, of decompositions, and bytes per second."""

    multiply: Mapping[torch.dtype, Rates]
    move: float
    decompose: Rates

    def seconds(self, kernel: Kernel) -> float:
        """As long as its FLOPs take or the bytes that it moves, whichever is longer."""
        rates = self.decompose if kernel.decomposes else self.multiply.get(kernel.dtype, self.multiply[torch.float32])
        return max(kernel.flops and kernel.flops / _at(rates, kernel.width), kernel.moved / self.move)


DEFAULTS = {
    "cpu": Machine({torch.float32: ((256, 4e10), (1024, 5e10))}, 1e10, ((256, 1.5e10), (512, 2.5e10))),
    "cuda": Machine({torch.float32: ((256, 5e12), (4096, 4e13))}, 1e12, ((256, 1e10), (4096, 3e11))),
}
"""What to expect of a core of a server and of a data-centre GPU in float32; for ranges only."""


def assumed(device: str) -> Machine:
    """Rates that were not measured."""
    return DEFAULTS["cuda" if device.startswith("cuda") else "cpu"]


BUDGET = 0.25
"""Seconds for each measurement, at least two repeats."""


@functools.cache
def measured(device: str, dtype: torch.dtype, products: str) -> Machine:
    """Rates for a model in `dtype`, with the threads and in the format of `products` that torch uses now."""

    def operand(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    def product(width: int, dtype: torch.dtype) -> float:
        a, b, result = (operand(rows, width, dtype) for rows in (1024, width, 1024))
        return 2 * 1024 * width**2 / _seconds(lambda: torch.mm(a, b, out=result), device)  # with `out` as given, never rounded

    def decomposition(width: int) -> float:
        x = operand(width, 2 * width, torch.promote_types(dtype, torch.float32))
        matrix = x @ x.T
        return 9 * width**3 / _seconds(lambda: eigh(matrix, "nothing"), device)

    dtypes = {torch.float32, dtype, rounded(operand(1, 1)).dtype}
    multiply = {each: tuple((width, product(width, each)) for width in (32, 256, 1024)) for each in dtypes}
    block = operand(2**12, 2**12 if device == "cpu" else 2**15)
    target = torch.empty_like(block)
    move = 2 * block.nbytes / _seconds(lambda: target.copy_(block), device)
    return Machine(multiply, move, tuple((width, decomposition(width)) for width in (256, 640)))


def _seconds(work: Callable[[], object], device: str) -> float:
    """The least time of several runs: what it takes when nothing else is running."""
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


@functools.lru_cache(4096)
def _at(rates: Rates, width: float) -> float:
    """Interpolated in logarithms; beyond the ends, the rate there."""
    widths, found = np.log(np.array(rates)).T
    return math.exp(np.interp(math.log(max(1, width)), widths, found))
