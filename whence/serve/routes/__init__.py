"""What a page can ask, by subject. Nothing here computes: that is for `Asking`, `Browser`, `Jobs` and the like."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

Offset = Annotated[int, Query(ge=0, le=10**9)]
Limit = Annotated[int, Query(ge=1, le=500)]
