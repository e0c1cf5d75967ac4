"""Names made from content: the same on every machine, in every process, in any order of the data."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from whence.errors import UsageError


def content_id(value: Any) -> str:
    """12 hex digits of the blake2b hash of a value's content.

    Takes numbers, strings, bytes, arrays, tensors, and mappings and sequences of those. A tensor and an array with the
    same type, shape and numbers have the same id, and so have a list and a tuple, and mappings in another order.
    """
    return content_digest(value)[:12]


def content_digest(value: Any) -> str:
    """32 hex digits of the same hash: long enough to tell the rows of any corpus apart."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any):
    """Yield bytes that spell the value; every part says its type and length, so that no two values spell the same."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | complex):
        yield f"{type(value).__name__} {value};".encode()
    elif isinstance(value, float):
        yield b"float " + struct.pack("<d", value)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        yield f"str {len(text)};".encode() + text
    elif isinstance(value, bytes):
        yield f"bytes {len(value)};".encode() + value
    elif isinstance(value, Mapping):
        yield f"dict {len(value)};".encode()
        for key in sorted(value):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"list {len(value)};".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, np.ndarray):
        little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        yield f"array {value.dtype.name} {value.shape};".encode() + little.tobytes()
    elif hasattr(value, "detach"):
        import torch

        flat, kind = value.detach().cpu().contiguous().reshape(-1), str(value.dtype).removeprefix("torch.")
        yield f"array {kind} {tuple(value.shape)};".encode() + flat.view(torch.uint8).numpy().tobytes()
    else:
        raise UsageError(
            "No stable id can be made for this row.",
            given=f"a value of type {type(value).__name__}",
            accepted="numbers, strings, bytes, numpy arrays, torch tensors, and dicts, lists and tuples of those",
        )
