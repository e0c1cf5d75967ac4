"""How each kind of layer turns its input and its output's gradient into the gradient of its weight.

One `Layer` per kind: the weight as a matrix `[O, I]` (a bias is a further column), what it reads, and the per-example
gradient. A new kind is one more entry in `LAYERS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whence.gradients import Dense, Factored, Gradient


@dataclass(frozen=True)
class Layer:
    """A kind of layer: `shape(module)` is (O, I); `gradient(module, x, g, B)` the gradient of `B` examples."""

    kind: str
    matches: Callable[[nn.Module], bool]
    shape: Callable[[nn.Module], tuple[int, int]]
    gradient: Callable[[Any, Any, Tensor, int], Gradient]
    reads: Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor | tuple[Tensor, ...]] = lambda module, args, kwargs: (
        args[0] if args else next(iter(kwargs.values()))
    )
    """The input that the weight is multiplied with, or all tensors that the gradient takes: its `x`."""
    columns: Callable[[nn.Module, Tensor, int], Tensor] | None = None
    """For layers that multiply their input as it is: the `a_BRI` of it, which modules with the same input share."""
    one_hot: bool = False
    """Whether output rows are picked one by one (an embedding): that side's covariance is diagonal."""
    parameters: Callable[[Any], list[nn.Parameter]] = lambda module: _own(module)
    """The parameters that hold the weight, itself first."""
    piece: int | None = None
    """Which row of these parameters is the weight; None for all of them."""
    parts: Callable[[Any, list[Tensor]], list[Tensor]] = lambda module, tensors: _linear_parts(tensors)
    """Views of tensors of the parameters' shapes (after any further dimensions) that make up the matrix `[..., O, I]`."""
    side: int = -1
    """Along which of the two the parts lie side by side."""
    whole: bool = False
    """Whether the gradient is formed for whole examples, and is no sum over positions."""
    dimensions: Callable[[Any], int] = lambda module: 2
    """Dimensions that the module's output has at least where examples are one of them: with fewer, one example was computed."""


PARTS = {"weight", "bias"}


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all modules in it, each once: as `model.modules()`, in a quarter of the time, and in another order."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def layer_of(module: nn.Module) -> Layer | None:
    """The kind of the module, None where whence can't take its gradient."""
    layer = next((layer for layer in LAYERS if layer.matches(module)), None)
    if isinstance(module, nn.MultiheadAttention):
        return None if makes_weights(module) or makes_weights(module.out_proj) else layer
    if layer is None or not makes_weights(module):
        return layer
    outputs = {parameter.shape[0] if parameter.ndim else None for parameter in module.parameters()}
    return replace(MADE, kind=layer.kind, dimensions=layer.dimensions) if len(outputs) == 1 and None not in outputs else None


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The module's weight and bias; all its parameters where none has that name."""
    named = [own for name in ("weight", "bias") if (own := module._parameters.get(name)) is not None]
    return named if "weight" in module._parameters else list(module.parameters(recurse=False))


def makes_weights(module: nn.Module) -> bool:
    """Whether the module makes its weight from parameters: pruned, normalised by weight or spectrum, or parametrised."""
    made = any(isinstance(vars(module).get(name), Tensor) for name in PARTS)
    return parametrize.is_parametrized(module) or (made and bool(module._parameters.keys() - PARTS))


def restricted(layer: Layer, module: nn.Module, kept: Sequence[bool]) -> Layer:
    """The layer with only some of its parameters: the weight without its bias, or a bias alone."""
    tensors = layer.parameters(module)
    sizes = [part.shape[layer.side] for part in layer.parts(module, [tensor.detach() for tensor in tensors])]
    places = [
        place
        for flag, size, end in zip(kept, sizes, itertools.accumulate(sizes), strict=True)
        if flag
        for place in range(end - size, end)
    ]

    def shape(module: nn.Module) -> tuple[int, int]:
        n_out, n_in = layer.shape(module)
        return (n_out, len(places)) if layer.side == -1 else (len(places), n_in)

    def gradient(module: Any, x: Any, g: Tensor, examples: int) -> Gradient:
        whole = layer.gradient(module, layer.columns(module, x, examples) if layer.columns else x, g, examples)
        if isinstance(whole, Factored):
            return replace(whole, a_BRI=whole.a_BRI[..., places])
        return Dense(whole.w_BOI[..., places] if layer.side == -1 else whole.w_BOI[..., places, :])

    def parts(module: Any, given: list[Tensor]) -> list[Tensor]:
        some, like = iter(given), tensors[list(kept).index(True)]
        further = given[0].shape[: given[0].ndim - like.ndim]
        whole = [
            next(some) if flag else given[0].new_empty(*further, *own.shape) for own, flag in zip(tensors, kept, strict=True)
        ]
        return [part for part, flag in zip(layer.parts(module, whole), kept, strict=True) if flag]

    return replace(
        layer,
        shape=shape,
        gradient=gradient,
        columns=None,
        parameters=lambda module: [own for own, flag in zip(layer.parameters(module), kept, strict=True) if flag],
        parts=parts,
    )


# Linear and its kin: y = x W^T + b


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, its subclasses (4/8-bit ones among them), and what quantisation libraries put in its place."""
    if isinstance(module, nn.Linear):
        return True
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not (isinstance(n_in, int) and isinstance(n_out, int)) or any(module.children()) or not hasattr(module, "bias"):
        return False
    weights = [own for name, own in module._parameters.items() if own is not None and name != "bias"]
    packed = any(not own.is_floating_point() for own in [*weights, *module.buffers(recurse=False)])
    return packed or not weights or (len(weights) == 1 and weights[0].numel() == n_in * n_out)


def _linear_shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features + (module.bias is not None)


def _linear_parts(tensors: list[Tensor]) -> list[Tensor]:
    weight, *bias = tensors
    return [weight, *(part.unsqueeze(-1) for part in bias)]


def _by_example(x: Tensor, examples: int) -> Tensor:
    """`[B, R, width]` of `[B, ..., width]` or of rows flattened example by example, `[B*R, width]`."""
    return x if x.ndim == 3 and x.shape[0] == examples else x.reshape(examples, -1, x.shape[-1])


def _with_ones(module: Any, x: Tensor, examples: int) -> Tensor:
    a_BRI = _by_example(x, examples)
    if module.bias is None:
        return a_BRI
    return torch.cat([a_BRI, a_BRI.new_ones(()).expand(*a_BRI.shape[:-1], 1)], -1)  # F.pad takes four times as long


def _linear_gradient(module: Any, a_BRI: Tensor, g: Tensor, examples: int) -> Gradient:
    return Factored(_by_example(g, examples), a_BRI)


# GPT-2's Conv1D: a linear layer that keeps its weight transposed


def _is_transposed_linear(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _transposed_shape(module: Any) -> tuple[int, int]:
    return module.weight.shape[1], module.weight.shape[0] + 1


def _transposed_parts(module: Any, tensors: list[Tensor]) -> list[Tensor]:
    weight, *biases = tensors
    return [weight.mT, *(bias.unsqueeze(-1) for bias in biases)]


# nn.MultiheadAttention: its output projection, which is never called as a module


def _attention_shape(module: Any) -> tuple[int, int]:
    return _linear_shape(module.out_proj)


def _attended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output projection's input: the attention again, with the identity in the projection's place."""
    width = module.out_proj.weight.shape[1]
    weight = torch.eye(width).to(module.out_proj.weight)
    state = {"out_proj.weight": weight, "out_proj.bias": weight.new_zeros(width)}
    if module.out_proj.bias is None:
        del state["out_proj.bias"]
    with torch.no_grad():
        attended, _ = torch.func.functional_call(module, state, args, kwargs)
    return attended


def _attention_gradient(module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    if not module.batch_first:
        x, g = x.transpose(0, 1), g.transpose(0, 1)
    return Factored(_by_example(g, examples), _with_ones(module.out_proj, x, examples))


# Convolution: a linear layer on patches


def _conv_shape(module: Any) -> tuple[int, int]:
    return module.out_channels, math.prod(module.weight.shape[1:]) + (module.bias is not None)


def _conv_parts(module: Any, tensors: list[Tensor]) -> list[Tensor]:
    return _linear_parts([tensors[0].flatten(-3), *tensors[1:]])


def _conv_gradient(module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    """Patches are the inputs and positions the summands; a grouped convolution is formed group by group.

    An example may be several images that follow each other, such as the frames of a clip: their positions are summands, too.
    """
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    patches = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # [B, C*k*k, positions]
    g_BOR = g.flatten(2)
    bias = [] if module.bias is None else [torch.ones_like(patches[:, :1])]
    if module.groups == 1:
        return Factored(_by_example(g_BOR.mT, examples), _by_example(torch.cat([patches, *bias], dim=1).mT, examples))
    by_group = [
        g_part @ torch.cat([x_part, *bias], dim=1).mT
        for x_part, g_part in zip(patches.chunk(module.groups, 1), g_BOR.chunk(module.groups, 1), strict=True)
    ]
    w_BOI = torch.cat(by_group, dim=1)
    return Dense(w_BOI if len(w_BOI) == examples else w_BOI.unflatten(0, (examples, -1)).sum(1))


# Embedding: a linear layer on one-hot rows; its weight [V, width] makes the token the output side


def _is_embedding(module: nn.Module) -> bool:
    """nn.Embedding, and subclasses that do nothing but scale its rows; others shift the indices, or ignore them."""
    scaled = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    return scaled or type(module).forward is nn.Embedding.forward


def _embedding_gradient(module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    """Positions whose output has no gradient, such as padding, pick no row: they are no sample of the tokens."""
    one_hot = F.one_hot(x.reshape(examples, -1), module.num_embeddings).to(g.dtype)
    if module.padding_idx is not None:
        one_hot[..., module.padding_idx] = 0
    a_BRI = _by_example(g, examples) * getattr(module, "embed_scale", 1)
    return Factored(one_hot * (a_BRI != 0).any(-1, keepdim=True), a_BRI)


# Norms: y = w * normalised(x) + b, a vector (two with a bias) instead of a matrix


def _is_rms_norm(module: nn.Module) -> bool:
    name, weight = type(module).__name__, getattr(module, "weight", None)
    named = (name.endswith("RMSNorm") and "Gated" not in name) or hasattr(module, "variance_epsilon")
    return named and isinstance(weight, Tensor) and weight.ndim == 1


def _norm_shape(module: Any) -> tuple[int, int]:
    return 1 + (getattr(module, "bias", None) is not None), module.weight.numel()


def _norm_parts(module: Any, tensors: list[Tensor]) -> list[Tensor]:
    return [part.flatten(-module.weight.ndim).unsqueeze(-2) for part in tensors]


def _norm_gradient(normalised: Tensor, module: Any, g: Tensor, examples: int) -> Gradient:
    width = module.weight.numel()
    rows = [(g * normalised).reshape(examples, -1, width).sum(1)]
    if getattr(module, "bias", None) is not None:
        rows.append(g.reshape(examples, -1, width).sum(1))
    return Dense(torch.stack(rows, dim=1))


def _layer_norm_gradient(module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    return _norm_gradient(F.layer_norm(x, module.normalized_shape, eps=module.eps), module, g, examples)


def _rms_norm_gradient(module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    eps = next((value for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None)) is not None), None)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return _norm_gradient(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps), module, g, examples)


# A weight that several modules share, each with a bias of its own: each bias is a column


def beside(layer: Layer, biases: list[nn.Parameter], module: nn.Module) -> Layer:
    """The layer of a module with the columns of all biases that go with its weight, its own one among them."""
    own = layer.parameters(module)[1:]

    def gradient(module: Any, x: Any, g: Tensor, examples: int) -> Gradient:
        given = layer.gradient(module, layer.columns(module, x, examples) if layer.columns else x, g, examples)
        if isinstance(given, Factored):
            return replace(given, a_BRI=spread(given.a_BRI))
        return Dense(spread(given.w_BOI))

    def spread(columns: Tensor) -> Tensor:
        width = columns.shape[-1] - len(own)
        wide = F.pad(columns[..., :width], (0, len(biases)))
        for bias in own:
            wide[..., width + next(n for n, each in enumerate(biases) if each is bias)] = columns[..., -1]
        return wide

    return replace(layer, gradient=gradient, columns=None, parameters=lambda module: [layer.parameters(module)[0], *biases])


# A weight that is made from others: the gradient goes through to the parameters that were trained


def _made_shape(module: Any) -> tuple[int, int]:
    parameters = list(module.parameters())
    return parameters[0].shape[0], sum(parameter[0].numel() for parameter in parameters)


def _made_gradient(module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    """Every example by itself through the module and back, once more; the parameters' gradients lie side by side."""
    made = {name: vars(module)[name] for name in PARTS if name in vars(module)}
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in module.named_parameters()}
    rows = []
    with torch.enable_grad():
        for x_part, g_part in zip(x.unflatten(0, (examples, -1)), g.unflatten(0, (examples, -1)), strict=True):
            y = torch.func.functional_call(module, parameters, (x_part.detach(),))
            found = torch.autograd.grad(y, list(parameters.values()), g_part, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([part.reshape(len(part), -1) for part in found], dim=1))
    vars(module).update(made)  # hooks that make weights keep them there
    return Dense(torch.stack(rows))


def _made_parts(module: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Each parameter `[..., O, *]` as a matrix."""
    further = tensors[0].ndim - next(module.parameters()).ndim
    return [tensor.flatten(further + 1) if tensor.ndim > further + 1 else tensor.unsqueeze(-1) for tensor in tensors]


MADE = Layer(
    "made weight",
    makes_weights,
    _made_shape,
    _made_gradient,
    parameters=lambda module: list(module.parameters()),
    parts=_made_parts,
)

LAYERS = (
    Layer(
        "attention output",
        lambda m: isinstance(m, nn.MultiheadAttention),
        _attention_shape,
        _attention_gradient,
        _attended,
        parameters=lambda m: list(m.out_proj.parameters()),
        dimensions=lambda m: 3,
    ),
    Layer("linear", _is_linear, _linear_shape, _linear_gradient, columns=_with_ones),
    Layer("linear", _is_transposed_linear, _transposed_shape, _linear_gradient, columns=_with_ones, parts=_transposed_parts),
    Layer(
        "convolution",
        lambda m: isinstance(m, nn.Conv2d),
        _conv_shape,
        _conv_gradient,
        parts=_conv_parts,
        dimensions=lambda m: 4,
    ),
    Layer(
        "embedding",
        _is_embedding,
        lambda m: (m.num_embeddings, m.embedding_dim),  # type: ignore[attr-defined]
        _embedding_gradient,
        one_hot=True,
    ),
    Layer(
        "norm",
        lambda m: isinstance(m, nn.LayerNorm) and m.elementwise_affine,
        _norm_shape,
        _layer_norm_gradient,
        parts=_norm_parts,
        side=-2,
        whole=True,
        dimensions=lambda m: 1 + len(m.normalized_shape),
    ),
    Layer("norm", _is_rms_norm, _norm_shape, _rms_norm_gradient, parts=_norm_parts, side=-2, whole=True),
)
