"""Float32 products of rounded operands, for CPUs that multiply bfloat16 fast but have no matrix units (AVX512-BF16).

torch's own setting, with which it rounds operands inside a product, gains next to nothing there: operands rounded before
the product, and its result widened after, make it twice as fast. The products accumulate in float32, and each result is
rounded to bfloat16 once.

Taken so are linear layers whose weight has no gradient, forward and backward, and products of tensors without a gradient,
which are whence's own. Attention stays as it is, and so does what einsum multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from whence.cost import worth_rounding


class RoundedOperands(TorchFunctionMode):
    """Inside, products of float32 matrices on a CPU round their operands first where that is worth it, forward and backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        way = None if kwargs else _WAYS.get(func)
        return func(*args, **kwargs or {}) if way is None else way(func, *args)


def _linear(func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    fixed = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return _Fixed.apply(x, weight.T, bias) if fixed and _worth(x, weight.T) else func(x, weight, bias)  # type: ignore[return-value]


def _addmm(func: Callable[..., Tensor], bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    fixed = not weight.requires_grad and not bias.requires_grad
    return _Fixed.apply(x, weight, bias) if fixed and _worth(x, weight) else func(bias, x, weight)  # type: ignore[return-value]


def _product(func: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    return _rounded(func, a, b) if _worth(a, b) and not (a.requires_grad or b.requires_grad) else func(a, b)


_WAYS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm), _product),
}


class _Fixed(torch.autograd.Function):
    """`x weight + bias` for a weight that has no gradient, of which nothing is kept but itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = _rounded(torch.matmul, x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _rounded(torch.matmul, grads[0], weight.T), None, None


def short(operand: Tensor) -> Tensor:
    """The operand rounded, if it is float32."""
    return operand.to(torch.bfloat16) if operand.dtype == torch.float32 else operand


def _rounded(func: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    return func(short(a), short(b)).to(a.dtype)


def _worth(a: Any, b: Any) -> bool:
    """Whether these are float32 matrices, or stacks of them, on a CPU, and large enough; tensors of torch's own kinds."""
    if not all(isinstance(x, Tensor) and type(x).__module__.partition(".")[0] == "torch" for x in (a, b)):
        return False  # a quantised weight, for one, multiplies in its own way
    if not a.dtype == b.dtype == torch.float32 or a.device.type != "cpu":
        return False
    if a.ndim < 2 or b.ndim < 2:
        return False
    rows = a.shape[-2] if b.ndim > 2 else a.shape[:-1].numel()  # a stack times one matrix is one product
    return worth_rounding(rows, a.shape[-1], b.shape[-1])
