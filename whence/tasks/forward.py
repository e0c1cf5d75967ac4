"""How a model wants to be called."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, which doesn't show the arguments and methods of the one inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted(model: Any) -> frozenset[str]:
    """Name the arguments of the model's `forward`."""
    return frozenset(inspect.signature(type(unwrapped(model)).forward).parameters)


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
