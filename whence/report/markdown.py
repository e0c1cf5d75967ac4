"""The report as Markdown: rows, statistics and percentiles of every prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from whence.report.html import clean
from whence.report.model import Query, Report, Row
from whence.report.numbers import percent, percentile, plain_number, times
from whence.report.tokens import BREAK, strong_runs, strongest
from whence.report.words import LIMITS, three_digits
from whence.store.manifest import atomic

WIDTH = 160
"""Characters of the text of a row."""


def write_markdown(report: Report, path: str | Path) -> Path:
    """Write the report as Markdown, whole or not at all."""
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(as_markdown(report).encode("utf-8", "replace"))
    return Path(path)


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    unit = report.unit.removesuffix(" per copy")
    parts = [
        f"# {escaped(report.title)}",
        f"Effects are in {report.unit}: by how much one more copy of a training row would have raised (+) or lowered (-) what "
        f"was measured, to first order. Raw: the same before dividing by N = {report.n_train:,}. {report.rows:,} rows were "
        f"scored with {report.method or 'a method that is not recorded'}.",
        *(f"> {escaped(note)}" for note in report.notes),
        *(part for query in report.queries for part in _query(query, report, unit)),
        *_trust(report),
        *_rest(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _query(query: Query, report: Report, unit: str) -> list[str]:
    asked = [f"**Prompt:** {escaped(query.prompt.strip())}"] if query.prompt else []
    asked.append(f"**{'Completion' if query.prompt else 'Text'}:** {escaped(query.completion.strip())}")
    asked += [f"**Rather than:** {escaped(query.contrast.strip())}"] if query.contrast else []
    asked += [f"**Of which:** {escaped(query.span.strip())}"] if query.span else []
    asked += [f"**Base model:** {escaped(query.base_completion.strip())}"] if query.base_completion else []
    asked += [f"**Reference:** {escaped(query.reference.strip())}"] if query.reference else []
    stated = [query.measured, query.sign]
    if query.stands_out is not None:
        stands = "**No row stands out:** " if query.diffuse else ""
        stated.append(f"{stands}the highest score is {times(query.stands_out)} the 99th percentile")
    if query.copy_rank:
        stated.append(f"a training row is this very text, and ranks {query.copy_rank}")
    if query.overlap:
        correlation = (
            "" if query.overlap.correlation is None else f"; rank correlation with the effects {query.overlap.correlation:+.2f}"
        )
        stated.append(
            f"word overlap (TF-IDF): top rows {query.overlap.top:.2f}, all rows {query.overlap.every:.2f}{correlation}"
        )
    return [
        f"## Query {query.number}",
        *asked,
        "\n".join(f"- {line}" for line in stated if line),
        f"### Raise it most ({unit})",
        _rows(query.raises, unit) or "No row raises it.",
        f"### Lower it most ({unit})",
        _rows(query.lowers, unit) or "No row lowers it.",
        f"### Statistics of all {report.rows:,} rows ({unit})",
        _statistics(query),
        *_parts(query),
    ]


def _rows(rows: Sequence[Row], unit: str) -> str:
    if not rows:
        return ""
    names = (
        "rank",
        "effect",
        unit,
        "raw",
        "share",
        "above % of rows",
        "x median",
        "source",
        "row",
        "copies",
        "shared words",
        "text",
    )
    return _table(
        names,
        (
            (
                str(row.rank),
                row.effect,
                three_digits(row.value),
                three_digits(row.raw),
                percent(row.share),
                percentile(row.percentile),
                "" if row.times_median is None else f"{row.times_median:,.1f}",
                escaped(row.source or ""),
                escaped(row.id) + (" **hub**" if row.hub else "") + (" exact" if row.exact else ""),
                str(row.copies),
                escaped(", ".join(row.words[:4])) + ("" if row.overlap is None else f" ({row.overlap:.2f})"),
                _snippet(row),
            )
            for row in rows
        ),
    )


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


def _statistics(query: Query) -> str:
    found = query.statistics
    numbers = (found.maximum, found.minimum, found.mean, found.median, found.deviation)
    first = _table(("max", "min", "mean", "median", "std"), [[three_digits(value) for value in numbers]])
    names = [f"{p} %" for p, _ in found.percentiles]
    return f"{first}\n\nPercentiles:\n\n{_table(names, [[three_digits(value) for _, value in found.percentiles]])}"


def _parts(query: Query) -> list[str]:
    parts = []
    if query.sources:
        rows = [(escaped(name), f"{count:,}", three_digits(value)) for name, count, value in query.sources]
        parts += ["### By source", _table(("source", "rows", "sum of effects"), rows)]
    if query.grid:
        cells = [
            (layer or "-", *("" if value is None else three_digits(value) for value in values))
            for layer, values in zip(query.grid.layers, query.grid.values, strict=True)
        ]
        parts += [
            f"### By layer and module, the {query.grid.rows} rows that raise it most",
            _table(("layer", *query.grid.modules), cells),
        ]
    return parts


def _trust(report: Report) -> list[str]:
    checks = [(check.name, check.result or f"{check.name}: not measured", check.meaning) for check in report.checks]
    parts = ["## How far to trust it", _table(("check", "result", "asks"), [[escaped(cell) for cell in row] for row in checks])]
    parts.append("\n".join(f"- {limit}" for limit in LIMITS))
    return parts + ([f"Not in this report, because it was not given: {', '.join(report.absent)}."] if report.absent else [])


def _rest(report: Report) -> list[str]:
    parts = []
    if report.hubs:
        rows = [(escaped(name), str(count), escaped(text[:WIDTH])) for name, count, text in report.hubs]
        parts += ["## Rows that top everything", _table(("row", "in the top 10 of so many queries", "text"), rows)]
    if report.health:
        names = ("module", "mean", "largest", "condition", "effective_rank", "zero", "sound")
        parts += [
            "## Health of the factors",
            _table(names, ([plain_number(entry[name]) for name in names] for entry in report.health)),
        ]
    if report.training:
        rows = [(escaped(name), escaped(plain_number(value))) for name, value in report.training]
        parts += ["## Training", _table(("what", "value"), rows)]
    for title, entries in report.evaluation.items():
        names = list(dict.fromkeys(name for entry in entries for name in entry))
        rows = [[escaped(plain_number(entry.get(name))) for name in names] for entry in entries]
        parts += [f"## {escaped(title)}", _table([escaped(name) for name in names], rows)]
    if report.self_influence:
        rows = [(str(row.rank), three_digits(row.value), escaped(row.id), _snippet(row)) for row in report.self_influence]
        parts += ["## Self-influence", _table(("rank", "nats", "row", "text"), rows)]
    parts += ["## Where it comes from", f"Made again by `{report.command}`." if report.command else ""]
    parts.append(
        _table(("what", "value"), [(escaped(name), escaped(value)) for name, value in report.provenance])
        if report.provenance
        else ""
    )
    return parts


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(names)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    line = clean(text).replace("\n", f"{BREAK} ").replace("\t", " ")
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
