"""Hashes of settings, files and our own code: nothing here needs torch, so that asking whether anything changed is quick."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from whence.version import __version__

PACKAGE = Path(__file__).parents[1]

NUMERIC = (
    "adapters",
    "attention",
    "capture",
    "casting",
    "cost",
    "coverage",
    "data",
    "dist",
    "engine",
    "experts",
    "filter",
    "fitting",
    "gradients",
    "indexing",
    "layers",
    "linalg",
    "methods",
    "operators",
    "parcels",
    "precision",
    "scoring",
    "stages",
    "store/compact",
    "store/scores",
    "tasks",
    "train/checkpoints",
    "train/replay",
    "train/replicas",
    "train/state",
    "train/unlearn",
)
"""Modules and subpackages whose source decides the numbers; tests/store/test_digest.py compares them with the imports."""


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
    if isinstance(value, Path) or (type(value).__module__, type(value).__name__) in (("torch", "dtype"), ("torch", "device")):
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


def fingerprint_code() -> str:
    """Version of the package and a hash over the sources that decide the numbers."""
    return f"{__version__} {fingerprint_sources(NUMERIC)}"


@functools.cache
def fingerprint_sources(names: tuple[str, ...]) -> str:
    """Hash the sources of modules and subpackages, such as "precision" and "store/compact"."""
    sources = sorted(
        path for name in names for path in (PACKAGE / f"{name}.py", *PACKAGE.glob(f"{name}/**/*.py")) if path.exists()
    )
    return digest(*(part for path in sources for part in (str(path.relative_to(PACKAGE)), path.read_bytes())))


def _describe_callable(function: Callable) -> str:
    """Name a function by where it is and what its source says, so that an edited lambda is another setting."""
    inner = inspect.unwrap(function)
    try:
        source = inspect.getsource(inner)
    except (OSError, TypeError):
        source = ""
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{inner.__module__}.{name} {digest(source)}"
