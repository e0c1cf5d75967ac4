"""PEFT's adapters: which of them are in use, and the gradients of their weights that are in no layer of their own.

LoRA's matrices are linear layers, and need nothing from here. Other weights of adapters (vectors that scale, factors of a
product that is never a layer, rows of an embedding) belong to a module that puts them to use beside the layer it adapts. Such
a module is run again, one example at a time, when its output's gradient arrives: exact whatever it computes, and slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whence.errors import CoverageError
from whence.gradients import Dense, Factored, Gradient
from whence.layers import Layer, layer_of

PLAIN = ("LoraLayer", "LNTuningLayer")
"""Kinds of adapters whose layers are called one after the other, so that hooks see what they multiply."""

UNSEEN = ("ParamWrapper", "MultiheadAttention")
"""Those of them whose weights are added to others before they multiply anything."""


def is_adapter(module: nn.Module) -> bool:
    """Whether the module holds weights of adapters, of which some are in use: PEFT's layers, and its copies of modules."""
    return hasattr(type(module), "adapter_layer_names") and hasattr(module, "active_adapters")


def adapter_weights(model: nn.Module, *, active: bool, copies: bool = True) -> set[int]:
    """The ids of the adapters' parameters that are in use, or of those that are not; with the copies of modules or without."""
    return {
        id(parameter)
        for module in model.modules()
        if is_adapter(module) and (copies or not hasattr(module, "original_module"))
        for attribute in module.adapter_layer_names  # type: ignore[union-attr]
        for name, parameter in _entries(module, attribute)
        if (name.split(".")[0] in module.active_adapters) == active  # type: ignore[operator]
    }


def refuse_unused(model: nn.Module) -> None:
    """Raise CoverageError where adapters are merged, switched off, prompts, chosen by task, or all of parameters."""
    for name, module in model.named_modules():
        if is_adapter(module) and (getattr(module, "merged", False) or module.disable_adapters):
            merged = getattr(module, "merged", False)
            raise CoverageError(
                f"The adapters of {name} are {'merged into its weight' if merged else 'switched off'}, so that they have "
                "no gradient",
                accepted="adapters in use, or a model without adapters",
                fix=f"model.{'unmerge_adapter' if merged else 'enable_adapter_layers'}(); for a model without adapters: "
                "model.merge_and_unload()",
            )
        configs = None if is_adapter(module) else getattr(module, "peft_config", None)
        for adapter, config in configs.items() if isinstance(configs, dict) else ():
            if getattr(config, "is_prompt_learning", False):
                raise refused_prompts(config, adapter)
            if _kind(config) == "poly":
                raise CoverageError(
                    f"The adapter {adapter} is mixed by task (poly), and needs the number of a task, which rows don't have",
                    accepted="LoRA, DoRA, IA3 and other adapters of layers that read nothing but the text",
                    fix="trace an adapter of layers, trained on the rows of one task: whence train MODEL DATA --lora",
                )
            if getattr(config, "target_parameters", None) and not getattr(config, "target_modules", None):
                raise CoverageError(
                    f"The adapter {adapter} is LoRA on parameters, which are added to before a layer multiplies with them, "
                    "so that their gradients can't be caught",
                    given=f"target_parameters: {', '.join(config.target_parameters)}",
                    accepted="adapters of layers (target_modules)",
                    fix="train the adapter on layers: peft.LoraConfig(target_modules=[...]), or whence train MODEL DATA --lora",
                )


def refused_prompts(config: Any, name: str) -> CoverageError:
    """What to say of adapters that are tokens put before the text, which no layer of the model multiplies."""
    return CoverageError(
        f"The adapter {name} is learned prompts ({_kind(config)}), whose gradients can't be tracked",
        accepted="LoRA, DoRA, IA3 and other adapters of layers, or all weights of a model",
        fix="trace an adapter of layers, trained on the same data: whence train MODEL DATA --lora",
    )


def _kind(config: Any) -> str:
    return str(getattr(config, "peft_type", "")).rpartition(".")[2].replace("_", " ").lower()


def adapter_layers(module: nn.Module) -> dict[str, Layer]:
    """A layer for each weight of an adapter in use that is in no layer of its own, named as in `ia3_l.default`."""
    if not is_adapter(module) or hasattr(module, "original_module") or not hasattr(module, "base_layer"):
        return {}
    if any(base.__name__ in UNSEEN for base in type(module).__mro__):
        return {}
    in_layers = set()
    if any(base.__name__ in PLAIN for base in type(module).__mro__):
        children = [child for name, child in module.named_modules() if name and not name.startswith("base_layer")]
        in_layers = {id(parameter) for child in children if layer_of(child) for parameter in child.parameters()}
    return {
        f"{attribute}.{name}": _layer(attribute, name, plain=name not in getattr(module, "lora_variant", ()))
        for attribute in (*module.adapter_layer_names, *module.other_param_names)  # type: ignore[misc]
        for name, parameter in _entries(module, attribute)
        if name.split(".")[0] in module.active_adapters and id(parameter) not in in_layers  # type: ignore[operator]
    }


def inside_adapter(module: nn.Module) -> set[int]:
    """The ids of the modules of an adapter's layer that it may use in ways that hooks don't see, so that they are no layers."""
    names = {base.__name__ for base in type(module).__mro__}
    if not is_adapter(module) or hasattr(module, "original_module") or (names & set(PLAIN) and not names & set(UNSEEN)):
        return set()
    inside = (child for name, child in module.named_modules() if name and name.split(".")[0] != "base_layer")
    return {id(child) for child in inside}


def _entries(module: nn.Module, attribute: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of what is filed under adapters' names, each by the adapter's name and its own in there."""
    held = getattr(module, attribute, None) if "." not in attribute else attrgetter(attribute)(module)
    if isinstance(held, nn.ModuleDict | nn.ParameterDict):
        yield from ((name, parameter) for name, parameter in held.named_parameters())


def _layer(attribute: str, name: str, plain: bool) -> Layer:
    """The layer of a weight; a `plain` one of an embedding is multiplied with tokens and nothing else."""
    if plain and attribute == "lora_embedding_A":
        gradient, one_hot = partial(_tokens_gradient, name), True
    elif plain and attribute == "lora_embedding_B":
        gradient, one_hot = partial(_width_gradient, name), False
    else:
        gradient, one_hot = partial(_gradient, f"{attribute}.{name}"), False

    def parameter(module: Any) -> nn.Parameter:
        return module.get_parameter(f"{attribute}.{name}")

    return Layer(
        "adapter",
        matches=is_adapter,
        shape=lambda module: _matrix_shape(parameter(module), one_hot),
        gradient=gradient,
        one_hot=one_hot,
        parameters=lambda module: [parameter(module)],
        parts=lambda module, tensors: [_matrix(tensors[0], parameter(module).ndim, one_hot)],
        whole=not (plain and attribute.startswith("lora_embedding_")),
    )


def _matrix_shape(parameter: Tensor, transposed: bool) -> tuple[int, int]:
    n_out, n_in = _matrix(parameter.detach(), parameter.ndim, transposed).shape
    return n_out, n_in


def _matrix(tensor: Tensor, ndim: int, transposed: bool) -> Tensor:
    """The weight as `[..., O, I]`: a vector as one row, more dimensions than two as columns, of LoRA's A of tokens `[V, r]`."""
    if transposed:
        return tensor.mT
    if ndim < 2:
        return tensor.unsqueeze(-2) if ndim else tensor[..., None, None]
    return tensor.flatten(tensor.ndim - ndim + 1) if ndim > 2 else tensor


def _tokens_gradient(name: str, module: Any, ids: Tensor, g: Tensor, examples: int) -> Gradient:
    """Of LoRA's A `[r, V]` on an embedding, as `[V, r]`: each token's row has what B gives back."""
    g_BRO = g.reshape(examples, -1, g.shape[-1])
    back = _scale(module, name) * (g_BRO.to(module.lora_embedding_B[name].dtype) @ module.lora_embedding_B[name].detach())
    return Factored(F.one_hot(ids.reshape(examples, -1), module.lora_embedding_A[name].shape[1]).to(back.dtype), back)


def _width_gradient(name: str, module: Any, ids: Tensor, g: Tensor, examples: int) -> Gradient:
    """Of LoRA's B `[d, r]` on an embedding, which multiplies the tokens' rows of A."""
    rows = F.embedding(ids.reshape(examples, -1), module.lora_embedding_A[name].detach().T)
    return Factored(_scale(module, name) * g.reshape(examples, -1, g.shape[-1]).to(rows.dtype), rows)


def _scale(module: Any, name: str) -> Any:
    """What LoRA's output is multiplied with, beside the scale of some embeddings."""
    scale = module._get_embed_scale()
    return module.scaling[name] * (1 if scale is None else scale.to(module.lora_embedding_B[name].dtype))


def _gradient(name: str, module: Any, x: Tensor, g: Tensor, examples: int) -> Gradient:
    """Of any weight: the module once more on each example by itself, and back from its output's gradient."""
    weight, matrices = module.get_parameter(name), []
    x_B, g_B = (tensor if len(tensor) == examples else tensor.unflatten(0, (examples, -1)) for tensor in (x, g))
    for one, upstream in zip(x_B.split(1), g_B.split(1), strict=True):
        one, upstream = (tensor if len(whole) == examples else tensor[0] for tensor, whole in ((one, x), (upstream, g)))
        with torch.enable_grad():
            own = weight.detach().requires_grad_()
            y = torch.func.functional_call(module, {name: own}, (one.detach(),))
        found = torch.zeros_like(own)  # also where the weight is one that other modules hold, too, and use
        if y.requires_grad:
            (found,) = torch.autograd.grad(y, own, upstream.to(y.dtype), allow_unused=True, materialize_grads=True)
        matrices.append(_matrix(found, weight.ndim, False))
    return Dense(torch.stack(matrices))
