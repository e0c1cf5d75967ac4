"""Fingerprints of what a result depends on: model, tokenizer, settings and code."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whence.version import __version__

CHUNK = 64 * 2**20
"""Bytes of a tensor that are copied to the host at a time."""

NUMERIC = (
    "capture",
    "cost",
    "coverage",
    "data",
    "experts",
    "fitting",
    "gradients",
    "indexing",
    "layers",
    "linalg",
    "operators",
    "partition",
    "precision",
    "probe",
    "scoring",
    "store/compact",
    "stream",
    "tasks",
)
"""Modules and subpackages whose source decides the numbers."""

NOT_THE_FUNCTION = {"_name_or_path", "base_model_name_or_path", "inference_mode", "revision", "transformers_version"}
"""Entries of a model's or an adapter's config that say where it came from, not what it computes."""


def digest(*parts: bytes | str) -> str:
    """Hash the parts in order: 16 hex digits. Where a part ends counts."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def plain(value: Any) -> Any:
    """Reduce settings to JSON values, the same ones in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    if callable(value):
        return _describe_callable(value)
    raise TypeError(f"a setting of type {type(value).__name__} has no fingerprint: {value!r}")


def canonical_json(value: Any) -> str:
    """Write a value so that equal values give equal text."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint_settings(settings: Any) -> str:
    """Hash settings: dictionaries, sequences, dataclasses, dtypes, paths and functions are all welcome."""
    return digest(canonical_json(settings))


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Fingerprint a model.

    `architecture` is its class with a hash of its config and structure; `weights` hashes every parameter and persistent
    buffer (name, dtype, shape, bytes; tied ones once), wherever it lives.
    """
    configs: list[Any] = [getattr(model, "config", None), *getattr(model, "peft_config", {}).values()]
    described = [_without_origin(config.to_dict()) for config in configs if hasattr(config, "to_dict")]
    structure = digest(str(model), canonical_json(described))
    with ThreadPoolExecutor() as pool:
        weights = list(pool.map(lambda named: _digest_tensor(*named), _state(model)))
    return {"architecture": f"{type(model).__name__} {structure}", "weights": digest(*weights)}


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


@functools.cache
def fingerprint_code() -> str:
    """Version of the package and a hash over the sources that decide the numbers."""
    package = Path(__file__).parents[1]
    sources = sorted(
        path for name in NUMERIC for path in (package / f"{name}.py", *package.glob(f"{name}/**/*.py")) if path.exists()
    )
    return (
        f"{__version__} {digest(*(part for path in sources for part in (str(path.relative_to(package)), path.read_bytes())))}"
    )


def _describe_callable(function: Callable) -> str:
    """Name a function by where it is and what its source says, so that an edited lambda is another setting."""
    inner = inspect.unwrap(function)
    try:
        source = inspect.getsource(inner)
    except (OSError, TypeError):
        source = ""
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{inner.__module__}.{name} {digest(source)}"


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_THE_FUNCTION}


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by name, each tensor once."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _digest_tensor(name: str, tensor: Tensor) -> str:
    """Hash a tensor's name, dtype, shape and bytes, copying `CHUNK` bytes at a time."""
    state = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(content), CHUNK):
        state.update(content[start : start + CHUNK].cpu().numpy().data)
    return state.hexdigest()
