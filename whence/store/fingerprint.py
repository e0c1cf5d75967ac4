"""Fingerprints of models, tokenizers and tensors."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from whence.layers import modules_of
from whence.operators import Operator
from whence.store.digest import canonical_json, digest

CHUNK = 64 * 2**20
"""Bytes of a tensor that are copied to the host at a time."""

SEEN = 16
"""Numbers of a tensor that a glance takes in, about."""

NOT_THE_FUNCTION = {"_name_or_path", "base_model_name_or_path", "inference_mode", "revision", "transformers_version"}
"""Entries of a model's or an adapter's config that say where it came from, not what it computes."""


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Fingerprint a model.

    `architecture` is its class with a hash of its config and structure; `weights` hashes every parameter and persistent
    buffer (name, dtype, shape, bytes; tied ones once), wherever it lives.
    """
    configs: list[Any] = [getattr(model, "config", None), *getattr(model, "peft_config", {}).values()]
    described = [_without_origin(config.to_dict()) for config in configs if hasattr(config, "to_dict")]
    structure = digest(str(model), canonical_json(described))
    state = list(_state(model))
    if sum(tensor.nbytes for _, tensor in state) < CHUNK:  # sooner hashed than threads are started
        weights = [_digest_tensor(*named) for named in state]
    else:
        with ThreadPoolExecutor() as pool:
            weights = list(pool.map(lambda named: _digest_tensor(*named), state))
    return {"architecture": f"{type(model).__name__} {structure}", "weights": digest(*weights)}


class Glance:
    """What a glance at a model shows without reading it: where its weights are, how often they were written to, a few of them.

    For asking at once whether anything changed since. Writing through `.data` is seen only where it changes one of the few
    numbers.
    """

    def __init__(self, model: nn.Module):
        self._tensors = _tensors(model)
        self._few: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self._tensors:
            flat = tensor.detach().reshape(-1)
            self._few.setdefault((tensor.device, tensor.dtype), []).append(flat[:: max(1, len(flat) // SEEN)])
        self._seen = self._look()

    def still_holds(self, model: nn.Module) -> bool:
        """Whether the model has the same tensors, in the same places, and nothing seems to have been written to them."""
        tensors = _tensors(model)
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        return same and self._look() == self._seen

    def _look(self) -> tuple[Any, ...]:
        places = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in self._tensors]
        return places, [torch.cat(some).view(torch.uint8).cpu().numpy().tobytes() for some in self._few.values()]


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in a tenth of the time that the model's own lists of them take."""
    kept = (tensors for module in modules_of(model) for tensors in (module._parameters, module._buffers))
    return [tensor for tensors in kept for tensor in tensors.values() if tensor is not None]


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Hash what turns text into ids: vocabulary, merges, normalisation, special tokens and chat template.

    How it pads and truncates is left out: both change with every call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = {key: part for key, part in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    else:
        rules = {"vocab": tokenizer.get_vocab()}
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    return digest(canonical_json({"rules": rules, "special": special, "template": tokenizer.chat_template}))


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors."""
    return digest(*(_digest_tensor(name, tensor) for name, tensor in tensors.items()))


def fingerprint_operator(of: Operator) -> dict[str, str]:
    """What an operator is, for people, and a hash of its identity."""

    def hashed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _digest_tensor("", value)
        if isinstance(value, Mapping):
            return {key: hashed(entry) for key, entry in value.items()}
        return [hashed(entry) for entry in value] if isinstance(value, list | tuple) else value

    return {"label": of.label, "identity": digest(canonical_json(hashed(of.identity())))}


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_THE_FUNCTION}


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by name, each tensor once."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _digest_tensor(name: str, tensor: Tensor) -> str:
    """Hash a tensor's name, dtype, shape and bytes, copying `CHUNK` bytes at a time.

    BLAKE3 is as hard to forge as the hashes of the standard library, and several times as fast: models are gigabytes.
    """
    state = blake3(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(content), CHUNK):
        state.update(content[start : start + CHUNK].cpu().numpy().data)
    return state.hexdigest(length=16)
