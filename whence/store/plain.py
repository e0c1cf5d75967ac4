"""Values as JSON has them, for documents that are read elsewhere; `whence.store.digest.plain` is for fingerprints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Dataclasses, tables' rows, arrays and their numbers as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if (listed := getattr(value, "tolist", None)) is not None:  # an array, or a number of one
        return plain(listed())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def encoded(value: Any) -> bytes:
    """The JSON of a value, in UTF-8; half characters, which JSON files may hold and UTF-8 can't, become question marks."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
