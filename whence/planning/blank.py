"""Models without their weights: on the meta device, from a config alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from whence.errors import WhenceError
from whence.models import auto_class, base_of, dtype_of, is_adapter, load_tokenizer, locate, not_loadable, tokenizer_home
from whence.settings import Lora
from whence.tasks.base import Task


def blank_model(
    name: str, dtype: str | torch.dtype = "auto", adapter: str | None = None, device: str | None = None
) -> nn.Module:
    """The model of a hub id or folder, or of an adapter with its base, of which only the config is read.

    It has the dtype that it would be loaded in on the device (default: the GPU, if there is one).
    """
    from transformers import AutoConfig

    name = locate(name)
    if adapter is None and is_adapter(name):
        name, adapter = base_of(name), name
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        wanted = dtype_of(config, dtype, device)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=wanted, trust_remote_code=False)
            return (model if adapter is None else _adapted(model, adapter)).eval()
    except WhenceError:
        raise
    except (OSError, ValueError) as error:
        raise not_loadable(name, error) from error


def _adapted(model: Any, adapter: str) -> nn.Module:
    from peft import PeftConfig, get_peft_model

    return get_peft_model(model, PeftConfig.from_pretrained(locate(adapter)))


def blank_adapter(model: nn.Module, task: Task, lora: Lora | None) -> nn.Module:
    """A model without its weights, with the adapter that `whence train` would put on it."""
    from whence.train.finetune import adapted

    with torch.device("meta"):
        return adapted(model, task, lora).eval()


def tokenizer_of(name: str) -> Any:
    """The tokenizer that `load_model` would load."""
    name = locate(name)
    return load_tokenizer(tokenizer_home(base_of(name), name) if is_adapter(name) else name)
