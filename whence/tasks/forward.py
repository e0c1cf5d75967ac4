"""How a model wants to be called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, which doesn't show the arguments and methods of the one inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted(model: Any) -> frozenset[str]:
    """Name the arguments of the model's `forward`."""
    return _arguments(type(unwrapped(model)).forward)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
