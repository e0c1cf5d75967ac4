"""Attention in whole float32 where other products are taken in a shorter format, and as plain products for second derivatives.

The fused attention of CPUs is made of many small products, and runs five times slower where these are rounded to bfloat16
than where they are not: it is the one product that has nothing to win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WholeAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` and its backward pass multiply in float32, whatever other products do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)

        def attend(query: Tensor, key: Tensor, value: Tensor, *more: Any, **settings: Any) -> Tensor:
            return _Whole.apply(lambda *tensors: func(*tensors, *more, **settings), query, key, value)  # type: ignore[return-value]

        return attend(*args, **kwargs)


class _Whole(torch.autograd.Function):
    """A function of tensors, forward and backward with whole products."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        with _whole_products(), torch.enable_grad():
            ctx.inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            ctx.output = function(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with _whole_products():
            found = iter(torch.autograd.grad(ctx.output, wanted, grads))
        return None, *(next(found) if tensor.requires_grad else None for tensor in ctx.inputs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products, which can be differentiated forwards, and more than once; fused kernels can't."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _whole_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
