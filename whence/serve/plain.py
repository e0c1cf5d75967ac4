"""What goes to the page: JSON, where text that is no UTF-8 is shown as such."""

from __future__ import annotations

import json
from typing import Any

from whence.store.plain import plain


def encoded(value: Any) -> bytes:
    """The JSON of a value, in UTF-8; half characters, which JSON files may hold and UTF-8 can't, become question marks."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
