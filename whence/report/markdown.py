"""The report as Markdown: rows, statistics and percentiles of every prompt."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from whence.report.html import clean, filled
from whence.report.model import Report, Row
from whence.show.tokens import BREAK, strong_runs, strongest
from whence.store.files import atomic

WIDTH = 160
"""Characters of the text of a row."""


def write_markdown(report: Report, path: str | Path) -> Path:
    """Write the report as Markdown, whole or not at all."""
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(as_markdown(report).encode("utf-8", "replace"))
    return Path(path)


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    page = filled("report.md.j2", report, width=WIDTH, text=escaped, snippet=_snippet)
    return re.sub("\n{3,}", "\n\n", page).strip("\n") + "\n"


def _snippet(row: Row) -> str:
    """The strongest stretch of the row, strong tokens between brackets; its beginning without scores per token."""
    if not row.pieces:
        text = " ".join(row.text.split())
        return escaped(text[:WIDTH]) + ("…" if len(text) > WIDTH else "")
    values = np.array(row.token_values)
    first, last = strongest(row.pieces, values, WIDTH)
    shown = "".join(
        escaped(f"{before}⟦{words}⟧{after}" if sign else words)
        for before, sign, words, after in strong_runs(row.pieces[first:last], values[first:last])
    )
    return f"{'…' if first else ''}{shown}{'…' if last < len(row.pieces) else ''}"


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    line = clean(text).replace("\n", f"{BREAK} ").replace("\t", " ")
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
