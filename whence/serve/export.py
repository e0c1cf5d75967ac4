"""One file that shows answers without a server: the page with its data inside, or the report where no page was built."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from whence.report import build_report
from whence.report.html import render
from whence.serve.asking import Asked
from whence.serve.guard import STATIC
from whence.serve.plain import plain
from whence.serve.state import now

PLACE = '<script type="application/json" id="whence-data">null</script>'
"""Where the data goes, word for word."""

HIDDEN = ("text", "pieces", "token_values", "words", "place", "window")
"""Of a row, what is left out of a file that may not show texts."""


def page(
    run: Mapping[str, Any], answers: Sequence[dict[str, Any]], pairs: Mapping[str, Any], found: Sequence[Asked], redact: bool
) -> bytes:
    """The file; `answers` are the documents of the questions `found`."""
    template = STATIC / "export.html"
    if redact:
        answers, pairs = [_redacted(answer) for answer in answers], {}
    if template.is_file() and PLACE in (text := template.read_text(encoding="utf-8")):
        data = {"run": run, "asked": answers, "pairs": pairs, "redacted": redact, "made": now()}
        inside = json.dumps(plain(data), ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
        return text.replace(PLACE, PLACE.replace("null", inside, 1), 1).encode("utf-8", "replace")
    queries, report = [], build_report(found[0].scores)
    for number, each in enumerate(found):
        (query,) = build_report(each.scores, top=len(answers[number]["query"]["raises"]) or 1).queries
        if redact:
            rows = {side: tuple(_without_text(row) for row in getattr(query, side)) for side in ("raises", "lowers")}
            query = replace(query, **rows)
        queries.append(replace(query, number=number))
    return render(replace(report, queries=tuple(queries), hubs=())).encode("utf-8", "replace")


def _without_text(row: Any) -> Any:
    return replace(row, text=f"(row {row.id})", pieces=(), token_values=(), words=())


def _redacted(answer: dict[str, Any]) -> dict[str, Any]:
    query = dict(answer["query"])
    for side in ("raises", "lowers"):
        query[side] = [{key: None if key in HIDDEN else value for key, value in row.items()} for row in query[side]]
    stages = [{**stage, "top": {"raises": [], "lowers": []}} for stage in answer["stages"]]
    return {**answer, "query": query, "stages": stages}
