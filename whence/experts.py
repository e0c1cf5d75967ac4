"""Experts of a sparse mixture, fused into one 3-D parameter per projection: every expert's matrix is a weight of its own.

Such a module of transformers maps tokens `x_NH`, the experts `index_NK` that each of them visits and `weight_NK` to
`y_n = sum_k weight_nk expert_e(x_n)`, where `e = index_nk` and `expert_e(x) = down_e act(up_e x)`. What happens in between
is in no module, so that nothing can be hooked there: when the output's gradient arrives, the expert runs again on the tokens
that visited it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whence.gradients import Factored
from whence.layers import Layer


def expert_layers(module: nn.Module) -> dict[str, Layer]:
    """A layer for each matrix of each expert, named as in `gate_up_proj.3`; none if the module holds no fused experts."""
    if not _is_fused(module):
        return {}
    return {
        f"{name}.{expert}": Layer(
            "expert",
            matches=_is_fused,
            shape=partial(_shape, name, expert),
            gradient=partial(_gradient, name, expert),
            reads=_reads,
            parameters=partial(_parameters, name),
            piece=expert,
            parts=partial(_parts, expert),
        )
        for name in (_first(module), "down_proj")
        for expert in range(module.num_experts)  # type: ignore[arg-type]
    }


def _is_fused(module: Any) -> bool:
    """What transformers' `use_experts_implementation` marks, without a norm after each expert, and whole on this device."""
    marked = all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed"))
    if not marked or module.has_post_expert_norm or module._is_expert_parallel:
        return False
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _matrix(module: Any, name: str, expert: int) -> Tensor:
    """The expert's weight `[O, I]`."""
    weight = getattr(module, name)[expert]
    return weight.T if module.is_transposed else weight


def _bias(module: Any, name: str, expert: int) -> Tensor | None:
    return getattr(module, f"{name}_bias")[expert] if module.has_bias else None


def _parameters(name: str, module: Any) -> list[nn.Parameter]:
    return [getattr(module, name), *([getattr(module, f"{name}_bias")] if module.has_bias else [])]


def _parts(expert: int, module: Any, tensors: list[Tensor]) -> list[Tensor]:
    weight, *bias = tensors
    matrix = weight[..., expert, :, :]
    return [matrix.mT if module.is_transposed else matrix, *(part[..., expert, :, None] for part in bias)]


def _shape(name: str, expert: int, module: Any) -> tuple[int, int]:
    n_out, n_in = _matrix(module, name, expert).shape
    return n_out, n_in + module.has_bias


def _reads(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    x_NH, index_NK, weight_NK = (*args, *kwargs.values())
    return x_NH, index_NK, weight_NK


def _gradient(name: str, expert: int, module: Any, read: tuple[Tensor, ...], g_NH: Tensor, examples: int) -> Factored:
    """The gradient of one matrix of one expert: its summands are the tokens that visited it."""
    x_NH, index_NK, weight_NK = read
    tokens, places = (index_NK == expert).nonzero(as_tuple=True)
    a_SI = x_NH[tokens]
    g_SO = g_NH[tokens] * weight_NK[tokens, places, None].to(g_NH.dtype)
    with torch.enable_grad():
        up = F.linear(a_SI, _matrix(module, _first(module), expert), _bias(module, _first(module), expert)).requires_grad_()
        middle = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    if name == "down_proj":
        a_SI = middle.detach()
    else:
        (g_SO,) = torch.autograd.grad(middle, up, g_SO @ _matrix(module, "down_proj", expert))
    if module.has_bias:
        a_SI = F.pad(a_SI, (0, 1), value=1.0)
    return _by_example(g_SO, a_SI, tokens, len(x_NH) // examples, examples)


def _by_example(g_SO: Tensor, a_SI: Tensor, tokens: Tensor, length: int, examples: int) -> Factored:
    """Sort tokens of `examples` sequences of the same length, in order, into as many rows as the busiest example has."""
    example, position = tokens // length, tokens % length
    counts = torch.bincount(example, minlength=examples)
    place = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[example]
    shape = (examples, max(1, int(counts.max())))
    g_BRO, a_BRI = g_SO.new_zeros(*shape, g_SO.shape[-1]), a_SI.new_zeros(*shape, a_SI.shape[-1])
    positions_BR = tokens.new_zeros(shape)
    g_BRO[example, place], a_BRI[example, place], positions_BR[example, place] = g_SO, a_SI, position
    return Factored(g_BRO, a_BRI, positions_BR)
