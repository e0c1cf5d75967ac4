"""Number formats of one run, as one value, and how products are taken in them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

Format = Literal["float64", "float32", "bfloat16", "float16"]
Products = Literal["auto", "float32", "bfloat16"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Precision:
    """Formats of what is multiplied; sums always accumulate in float32 or better.

    `statistics` are the operands of covariances and of corrected eigenvalues, `scores` those of inner products with
    the queries: lower ones take less memory; a float64 model is never lowered. `products` is what the hardware may
    round float32 operands to inside a matrix product, the model's own included: "bfloat16" (TensorFloat-32 on GPUs) is
    faster where there are units for it, and everything that stays is float32 (CPUs round some results once, too).
    "auto" takes it where the work is worth it and the inner products of a few of the rows' gradients hardly move (see
    `whence.engine.probe`). Eigenvectors are solved in float64, but in float32 where products are shorter than that: twice as
    fast, and less than what the products lose.
    """

    statistics: Format = "float32"
    scores: Format = "float32"
    products: Products = "auto"

    def operands(self, purpose: Literal["statistics", "scores"], model: torch.dtype) -> torch.dtype:
        """The format to multiply in for a model of the given format."""
        import torch

        return torch.float64 if model == torch.float64 else getattr(torch, getattr(self, purpose))

    def sums(self, model: torch.dtype) -> torch.dtype:
        """The format to accumulate in."""
        import torch

        return torch.promote_types(model, torch.float32)

    def settings(self) -> dict[str, str]:
        """For fingerprints."""
        return dict(asdict(self))


EXACT = Precision(products="float32")
"""float32 throughout."""


def has_units(device: torch.device) -> bool:
    """Whether the device multiplies float32 operands rounded to a shorter format faster: tensor cores, AMX, AVX512-BF16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    matrices = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()
    return matrices or _rounds_before(device)


def _rounds_before(device: torch.device) -> bool:
    """Whether operands are better rounded before a product than by torch inside it: AVX512-BF16 without AMX."""
    import torch

    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


_short: ContextVar[bool] = ContextVar("short", default=False)
"""Whether `multiplying` has products taken in a shorter format."""

_mode: ContextVar[TorchFunctionMode | None] = ContextVar("mode", default=None)
"""What takes them on a CPU."""


def are_short() -> bool:
    """Whether products are taken in a shorter format here."""
    return _short.get()


def rounded(operand: Tensor) -> Tensor:
    """An operand of several products, rounded once where each of them would round it anew."""
    from whence.casting import RoundedOperands, short

    return short(operand) if isinstance(_mode.get(), RoundedOperands) else operand


def kept_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format to keep operands in that go into many products: on a CPU that to which short products round them anyway."""
    import torch

    return torch.bfloat16 if are_short() and dtype == torch.float32 and device.type == "cpu" else dtype


KEPT_SHAPES = 32
"""For how many shapes of operands torch and oneDNN keep what they prepared of short products on a CPU, half a megabyte each.
They would for 1024, but ragged rows make a new shape of nearly every batch, and preparing anew takes no time that shows."""


def _keep_few_shapes() -> None:
    """Bound what is kept, unless the user has; it is read once, before the first short product."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_SHAPES))


@contextlib.contextmanager
def multiplying(products: Products, device: torch.device) -> Iterator[None]:
    """Take the float32 products inside in this format; on a CPU but for those of fused attention, which get slower by it."""
    import torch

    from whence.attention import WholeAttention
    from whence.casting import RoundedOperands

    short, before, mode = products == "bfloat16", _rounds_before(device), None
    if short and device.type == "cpu":
        _keep_few_shapes()
        mode = RoundedOperands() if before else WholeAttention()
    setting, kept = torch.get_float32_matmul_precision(), (_short.set(short), _mode.set(mode))
    torch.set_float32_matmul_precision("medium" if short and not before else "highest")
    try:
        with mode or contextlib.nullcontext():
            yield
    finally:
        _short.reset(kept[0])
        _mode.reset(kept[1])
        torch.set_float32_matmul_precision(setting)


def multiplying_on(hook: Callable[P, R]) -> Callable[P, R]:
    """A hook of a backward pass, which torch calls without its modes, that multiplies as its surroundings do."""

    @functools.wraps(hook)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if (mode := _mode.get()) is None:
            return hook(*args, **kwargs)
        with mode:
            return hook(*args, **kwargs)

    return wrapped
