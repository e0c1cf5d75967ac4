"""How a model wants to be called, and where in what it returns the logits are."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # type: ignore[import-not-found]
from torch._subclasses.fake_tensor import FakeTensor

from whence.errors import UsageError

PARALLEL = (nn.parallel.DataParallel, nn.parallel.DistributedDataParallel)

_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose outputs were looked at and are no probabilities."""


def unwrapped(model: Any) -> Any:
    """Return the model inside of wrappers: PEFT's, torch's, and modules that hand what they are given to a model of theirs."""
    inner = _inside(model)
    return model if inner is None else unwrapped(inner)


def borrowed(model: Any) -> Any:
    """Return the model inside of torch's wrappers, compiled or parallel, whose weights are the same: what whence works with."""
    while hasattr(model, "_orig_mod") or isinstance(model, PARALLEL):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def accepted(model: Any) -> frozenset[str]:
    """Name the arguments of the model's `forward`; of one that takes any, those of the model inside, or at least the mask."""
    if hasattr(model, "get_base_model"):
        return accepted(model.get_base_model())
    model = borrowed(model)
    parameters = _parameters(type(model).forward)
    names = frozenset(parameters)
    if hasattr(model, "get_output_embeddings") or all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
        return names
    inner = _inside(model)
    return names | ({"attention_mask"} if inner is None else accepted(inner))


@functools.lru_cache(64)
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a model's `forward` takes; every batch asks."""
    return inspect.signature(forward).parameters


def logits_of(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Run a model, and find the logits: its output, `logits` of an object or a dict, or the first tensor of a tuple.

    Raises UsageError where there are none.
    """
    config: Any = getattr(unwrapped(model), "config", None)
    if getattr(config, "return_dict", True):
        output = model(*inputs, **named)
    else:  # which transformers' own layers don't all heed
        config.return_dict = True
        try:
            output = model(*inputs, **named)
        finally:
            config.return_dict = False
    if isinstance(output, Mapping):
        found, given = output.get("logits"), f"a {type(output).__name__} with {', '.join(map(str, output))}"
    elif isinstance(output, Tensor) or hasattr(output, "logits"):
        found, given = getattr(output, "logits", output), f"{type(output).__name__}"
    else:
        parts = output if isinstance(output, tuple | list) else ()
        found = next((part for part in parts if isinstance(part, Tensor) and part.ndim > 1), None)
        fields = [field.name for field in dataclasses.fields(output)] if dataclasses.is_dataclass(output) else []
        given = f"a {type(output).__name__}" + (f" with {', '.join(fields)}" if fields else "")
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise UsageError(
            f"{type(model).__name__} gives no logits.",
            given=given,
            accepted="a tensor, an object or dict with `logits`, or a tuple whose first tensor they are",
            fix="return the logits from forward, of a language model with its head (AutoModelForCausalLM, not AutoModel)",
        )
    return found


def check_logits(logits: Tensor, model: nn.Module) -> None:
    """Raise UsageError where the numbers are probabilities, whose softmax would be another distribution.

    A model is looked at once; outputs without numbers, or inside a transform, can't be.
    """
    if model in _seen or is_functorch_wrapped_tensor(logits) or isinstance(logits, FakeTensor) or logits.is_meta:
        return
    with torch.no_grad():
        rows = logits.float()
        if bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-3).all()):
            raise UsageError(
                f"{type(model).__name__} gives probabilities, where logits are needed.",
                given=f"numbers from {float(rows.min()):.3g} to {float(rows.max()):.3g} that add up to 1",
                accepted="what softmax is taken of (log-probabilities are logits, too)",
                fix="leave the softmax at the end of forward out, or return its logarithm",
            )
    _seen.add(model)


def _inside(model: Any) -> Any:
    """The model that a wrapper hands on to, None for what is no wrapper."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if borrowed(model) is not model:
        return borrowed(model)
    if hasattr(model, "get_output_embeddings") or not isinstance(model, nn.Module):
        return None
    inside = _models_in(model)
    return inside[0] if len(inside) == 1 else None


def _models_in(module: nn.Module) -> list[nn.Module]:
    """The outermost modules in there that take the ids of tokens."""
    takes = {child: "input_ids" in accepted(child) for child in module.children()}
    return [each for child, takes_ids in takes.items() for each in ([child] if takes_ids else _models_in(child))]


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Switch dropout and its like on or off, and give every module back its mode."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
